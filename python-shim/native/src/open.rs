//! What a path is, if it is no run, and what is wrong with a run, in the words of the Python package.

use std::{fs, os::unix::ffi::OsStrExt, path::Path};

use flexmodel_run::{
    OpenError, Run,
    format::{MANIFEST_FILE, RUN_FILE},
    read::nodes::{inside, is_run},
    text::clip,
};
use pyo3::PyErr;

use crate::{RunError, RunNotFoundError};

/// The error that helps most if there is no run.
pub fn expect_run(path: &Path) -> Result<(), PyErr> {
    let shown = path.display();
    let refuse = |why: String| Err(RunError::new_err(why));
    if path.as_os_str().as_bytes().contains(&0) {
        return refuse(format!("{shown} cannot be read: it has a zero byte"));
    }
    let hint = "pass the directory that `flexmodel run --out` was given";
    let meta = match fs::metadata(path) {
        Ok(meta) => meta,
        Err(e) if matches!(e.raw_os_error(), Some(2 | 20 | 40)) => {
            return Err(RunNotFoundError::new_err(format!("there is no run at {shown}: {hint}")));
        }
        Err(e) => return refuse(format!("{shown} cannot be read: {e}")),
    };
    if !meta.is_dir() {
        return refuse(match path.parent() {
            Some(parent) if is_run(parent) => format!("{shown} is a file: open its directory, {}", parent.display()),
            _ => format!("{shown} is a file: pass the directory of a run"),
        });
    }
    if is_run(path) {
        return Ok(());
    }
    let entries = match fs::read_dir(path) {
        Ok(mut entries) => entries.next().is_some(),
        Err(e) => return refuse(format!("{shown} cannot be read: {e}")),
    };
    match inside(path).as_slice() {
        [one] => refuse(format!("{shown} is not a run but holds one: open {one} in it")),
        [] if entries => {
            refuse(format!("{shown} is not a run (it has neither {RUN_FILE} nor {MANIFEST_FILE}): {hint}"))
        }
        [] => refuse(format!("{shown} is empty: {hint}")),
        _ => Ok(()),
    }
}

pub fn refused(error: OpenError) -> PyErr {
    RunError::new_err(error.to_string())
}

/// What was found to be wrong. An error if nothing of the run reads.
pub fn problems(run: &Run) -> Result<Vec<String>, PyErr> {
    let root = run.path.display();
    let mut all = Vec::new();
    for problem in &run.problems {
        let (place, what) = (&problem.place, clip(&problem.what));
        if place == RUN_FILE || place.ends_with(&format!("/{RUN_FILE}")) {
            let why = match what.strip_prefix("damaged ").map(str::to_owned) {
                Some(why) => format!("{root}/{place} cannot be read {why}"),
                None => format!("{root}/{place} is missing"),
            };
            if run.records.is_empty() {
                let nothing = "there is no readable record: this is no run, or nothing of it is left";
                return Err(RunError::new_err(format!("{why}, and {nothing}")));
            }
            all.push(format!("{why}; the records are served without it"));
        } else if let Some((file, line)) = place.rsplit_once(" line ") {
            all.push(format!("{root}/{file}: line {line} is skipped: {what}"));
        } else {
            all.push(format!("{root}/{place}: {what}"));
        }
    }
    if run.finished() {
        all.extend(run.notes.iter().filter(|note| note.contains("half a line")).map(|note| format!("{root}: {note}")));
    }
    all.extend(run.shard_problems().into_iter().map(|what| format!("{root}: {what}")));
    Ok(all.iter().map(|text| flexmodel_run::text::safe(text)).collect())
}
