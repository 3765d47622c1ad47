//! The dashboard of a run that is there already.

mod rank;

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use rank::*;
use serde_json::{Value, json};

/// A run of the `produce` example whose command ended with 7: five steps on two ranks.
fn finished(folder: &Path) -> PathBuf {
    let (home, out) = (folder.join("home"), folder.join("run"));
    fs::create_dir_all(&home).unwrap();
    for name in ["libflexmodel.so", "libflexmodel_engine.so"] {
        fs::write(home.join(name), "").unwrap();
    }
    let produce = Path::new(env!("CARGO_BIN_EXE_flexmodel")).with_file_name("examples").join("produce");
    let script =
        format!("{} --socket ${{FLEXMODEL_AGENT#unix:}} --steps 5 --elements 64 --slab 16M; exit 7", produce.display());
    let mut command = Command::new(env!("CARGO_BIN_EXE_flexmodel"));
    command.args(["run", "--hooks", "a", "--out"]).arg(&out).args(["--", "bash", "-c", &script]);
    command.env("FLEXMODEL_HOME", home).env_remove("FLEXMODEL_DISABLE").stderr(Stdio::null());
    assert_eq!(command.status().unwrap().code(), Some(7));
    out
}

/// What the dashboard's API answers.
fn ask(agent: &Agent, path: &str) -> Value {
    let (status, body) = agent.ask(path);
    assert_eq!(status, 200, "{path}: {body}");
    serde_json::from_str(&body).unwrap()
}

fn steps(agent: &Agent) -> Value {
    ask(agent, "/api/series?module=layers.0.mlp&kind=forward")["series"].as_array().unwrap().last().unwrap()["points"]["step"].clone()
}

#[test]
fn a_finished_run_is_shown_again_and_stays_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let out = finished(dir.path());
    let files = || ["run.json", "manifest.jsonl"].map(|name| fs::read(out.join(name)).unwrap());
    let before = files();
    let agent = Agent::start(dir.path());
    let run = ask(&agent, "/api/run");
    assert_eq!((&run["state"], &run["shown_again"]), (&json!("finished"), &json!(true)));
    assert_eq!((&run["info"]["exit_code"], &run["totals"]["records"]), (&json!(7), &json!(55)));
    assert_eq!(run["ranks"].as_array().unwrap().len(), 2);
    assert_eq!(steps(&agent), json!([0, 1, 2, 3, 4]));
    let records = ask(&agent, "/api/records?module=layers.0.mlp&kind=forward&limit=9");
    assert_eq!(records["records"].as_array().unwrap().len(), 5);
    let tensor = ask(&agent, "/api/tensor?module=layers.0.mlp&kind=forward&path=out&step=2");
    assert_eq!(tensor["shape"], json!([16, 8]));
    // Time for a tick that would write run.json.
    std::thread::sleep(std::time::Duration::from_millis(1200));
    assert_eq!(info(&out)["exit_code"], 7);
    agent.finish();
    assert_eq!(files(), before);
    verify(&out);
}

#[test]
fn a_finished_run_goes_on_when_a_rank_attaches() {
    let dir = tempfile::tempdir().unwrap();
    let out = finished(dir.path());
    let ended = info(&out)["finished_ns"].clone();
    let agent = Agent::start(dir.path());
    let mut rank = Rank::attached(&agent, 0, 1, 1 << 20);
    let run = ask(&agent, "/api/run");
    assert_eq!((&run["state"], &run["shown_again"]), (&json!("live"), &json!(false)));
    rank.ship("layers.0.mlp", 5, 3);
    rank.drained();
    wait_until("the new record, of another job", || steps(&agent) == json!([5]));
    agent.finish();
    assert_eq!((&info(&out)["exit_code"], total(&out, "records")), (&Value::Null, 56));
    assert_ne!(info(&out)["finished_ns"], ended);
    verify(&out);
}

#[test]
fn records_of_long_ago_are_found_without_holding_the_manifest() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::start(dir.path());
    let out = agent.out.clone();
    let mut rank = Rank::attached(&agent, 0, 1, 1 << 20);
    rank.ship("a", 0, 2);
    rank.stream = None;
    agent.finish();
    // A long run of it, by its manifest: all records share their bytes.
    let mut part = parts(&out).remove(0);
    let mut manifest = Vec::new();
    for step in 0..60_000 {
        part["step"] = step.into();
        let rec = part.to_string();
        writeln!(manifest, "{{\"crc\":\"{:08x}\",\"rec\":{rec}}}", crc32c::crc32c(rec.as_bytes())).unwrap();
    }
    manifest.extend(fs::read(out.join("manifest.jsonl")).unwrap());
    assert!(manifest.len() > 20 << 20);
    fs::write(out.join("manifest.jsonl"), manifest).unwrap();
    let agent = Agent::start(dir.path());
    let look = |step: u64| {
        let tensor = ask(&agent, &format!("/api/tensor?module=a&kind=forward&path=out&step={step}"));
        assert_eq!((&tensor["step"], &tensor["shape"]), (&step.into(), &json!([2, 16])));
    };
    look(59_999);
    let before = agent.memory("VmRSS");
    [100, 20_000, 40_000].into_iter().for_each(look);
    let grown = agent.memory("VmRSS").saturating_sub(before);
    assert!(grown < 12 << 20, "{} MB more", grown >> 20);
    assert!(before < 64 << 20, "{} MB after the manifest was read", before >> 20);
}

/// As a quota or a network file system does it, or somebody.
#[test]
fn a_shard_that_is_cut_short_is_an_error_on_the_page_and_the_agent_lives() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::start(dir.path());
    let mut rank = Rank::attached(&agent, 0, 1, 1 << 20);
    for step in 0..9 {
        rank.ship("a", step, 4096);
    }
    rank.drained();
    let look = |step: u64| agent.ask(&format!("/api/tensor?module=a&kind=forward&path=out&step={step}"));
    wait_until("the last record", || look(8).0 == 200);
    let shard = agent.out.join("shard-00000.open");
    // Within the first tensor; then there is not even a header.
    for len in [(1 << 20) + 5000, 0] {
        fs::File::options().write(true).open(&shard).unwrap().set_len(len).unwrap();
        for step in [0, 8] {
            let (status, body) = look(step);
            assert_eq!(status, 404, "{body}");
            assert!(body.contains("shard-00000.open: the file is shorter than the manifest says"), "{body}");
        }
    }
    assert_eq!(ask(&agent, "/api/run")["state"], "live");
    fs::remove_file(&shard).unwrap();
    let (status, body) = look(0);
    assert!(status == 404 && body.contains("missing"), "{body}");
    rank.ship("a", 9, 1);
    rank.drained();
    wait_until("a capture after that", || agent.parts() == 10);
}

/// A run of before secrets were left out, or that somebody wrote by hand.
#[test]
fn secrets_in_a_run_that_is_shown_again_are_not_shown() {
    let dir = tempfile::tempdir().unwrap();
    let out = finished(dir.path());
    let mut run = info(&out);
    run["command"] = json!(["train.py", "--api-key", "SECRET123"]);
    fs::write(out.join("run.json"), run.to_string()).unwrap();
    let agent = Agent::start(dir.path());
    let run = ask(&agent, "/api/run");
    assert_eq!((&run["shown_again"], &run["info"]["command"][2]), (&json!(true), &json!("***")));
}
