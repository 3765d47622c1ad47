//! Directories that are not taken, and why.

use super::*;

fn error(path: &Path) -> String {
    let notify = Box::new(|_: &str| {});
    format!("{:#}", Store::open(path, Options { shard_bytes: 1 << 20, notify }).unwrap_err())
}

#[test]
fn a_folder_with_other_files_is_refused_with_a_name_that_is_free() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    fs::create_dir_all(&out).unwrap();
    fs::create_dir_all(dir.path().join("out-2")).unwrap();
    fs::write(out.join("thesis.tex"), "x").unwrap();
    let text = error(&out);
    assert!(text.contains("out-3") && !text.contains('\n'), "{text}");
    assert!(format!("{:#}", dir::check_fresh(&out).unwrap_err()).contains("out-3"));
}

#[test]
fn a_second_agent_on_the_same_directory_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let _first = store(dir.path());
    let text = error(dir.path());
    assert!(text.contains(&format!("process {}", std::process::id())), "{text}");
}

#[test]
fn a_run_is_continued_by_an_agent_but_is_not_fresh() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    dir::check_fresh(&out).unwrap();
    dir::check_fresh(&out).unwrap();
    store(&out).finish(true);
    store(&out).finish(true);
    assert!(format!("{:#}", dir::check_fresh(&out).unwrap_err()).contains("holds a run already"));
}

#[test]
fn a_place_that_cannot_be_written_is_one_line() {
    for path in ["/proc/flexmodel/run", "/dev/null/run"] {
        for text in [error(Path::new(path)), format!("{:#}", dir::check_fresh(Path::new(path)).unwrap_err())] {
            assert!(text.contains(path) && text.contains("--out") && !text.contains('\n'), "{text}");
        }
    }
}

#[test]
fn a_newer_format_is_refused_by_its_number() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join(crate::format::RUN_FILE), r#"{"format": 99}"#).unwrap();
    assert!(error(dir.path()).contains("format 99"));
}
