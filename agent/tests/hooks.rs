//! `flexmodel hooks` as a person runs it: how the agent of a run is found, and what is said where it cannot be asked.

mod rank;

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Command, Output, Stdio},
};

use rank::*;
use serde_json::{Value, json};

/// Exit code and stderr of a command that prints nothing else.
#[track_caller]
fn refused(done: &Output) -> (Option<i32>, String) {
    assert_eq!(String::from_utf8_lossy(&done.stdout), "");
    let line = String::from_utf8(done.stderr.clone()).unwrap();
    assert_eq!(line.lines().count(), 1, "{line}");
    (done.status.code(), line.strip_prefix("flexmodel: ").unwrap().trim_end().to_owned())
}

fn hooks(run: &Path, more: &[&str]) -> Output {
    flexmodel(&[&["hooks", run.to_str().unwrap()], more].concat())
}

fn lock(run: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(run.join("agent.lock")).unwrap()).unwrap()
}

/// Has an agent's lock say something else.
fn say(run: &Path, what: &Value) {
    fs::write(run.join("agent.lock"), format!("{what}\n")).unwrap();
}

#[test]
fn the_lock_says_where_its_agent_answers_and_is_its_owners_alone() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::with(dir.path(), &["--read-only"]);
    let (host, token) = agent.page();
    // The page is announced before that is written.
    wait_until("the port", || lock(&agent.out)["port"].is_u64());
    let said = lock(&agent.out);
    assert_eq!((&said["pid"], &said["token"]), (&json!(agent.child.id()), &json!(token)));
    assert!(host.ends_with(&format!(":{}", said["port"])) && said["node"].is_string(), "{said}");
    let mode = fs::metadata(agent.out.join("agent.lock")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let (code, line) = refused(&hooks(&agent.out, &["add", "layers.0"]));
    assert!(code == Some(1) && line.contains("--read-only"), "{line}");
    // Another agent names this one, whatever more there is in the lock.
    let (socket, out) = (dir.path().join("other.sock"), agent.out.to_str().unwrap());
    let (code, line) = refused(&flexmodel(&["agent", "--socket", socket.to_str().unwrap(), "--out", out]));
    let expected = format!("is being written by another agent (process {})", agent.child.id());
    assert!(code == Some(1) && line.contains(&expected), "{line}");
}

#[test]
fn a_run_that_is_over_has_no_hooks_to_change() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::start(dir.path());
    let out = agent.out.clone();
    let over = format!("no agent writes to {0}: the run is over (its revisions: flexmodel ls {0})", out.display());
    agent.finish();
    for more in [&[][..], &["add", "layers.0"], &["--json"], &["remove", "1"]] {
        let (code, line) = refused(&hooks(&out, more));
        assert!(code == Some(1) && line.starts_with(&over), "{line}");
    }
    let (code, line) = refused(&hooks(dir.path(), &[]));
    assert!(code == Some(1) && line.contains("there is one in it"), "{line}");
    for wrong in [&["add"][..], &["remove", "x"], &["clear"]] {
        assert_eq!(hooks(&out, wrong).status.code(), Some(2), "{wrong:?}");
    }
}

#[test]
fn an_agent_that_cannot_be_asked_is_named_with_the_reason() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::start(dir.path());
    let out = agent.out.clone();
    wait_until("the port", || lock(&out)["port"].is_u64());
    let said = lock(&out);
    let with = |name: &str, value: Value| {
        let mut other = said.clone();
        other[name] = value;
        say(&out, &other);
        let (code, line) = refused(&hooks(&out, &["add", "layers.0"]));
        assert_eq!(code, Some(1), "{line}");
        line
    };
    assert_eq!(with("node", json!("b")), format!("the agent of {} is on host b: run this there", out.display()));
    assert!(with("port", json!(1)).contains("does not answer on 127.0.0.1:1"));
    assert!(with("port", Value::Null).contains("only starting"));
    assert!(with("token", json!("no")).contains("token"));
    // It becomes no header of its own.
    assert!(with("token", json!("x\r\nHost: elsewhere")).contains("of an older version"));
    say(&out, &json!(7));
    let older = format!("the agent of {} (process 7) is of an older version, whose hooks do not change", out.display());
    assert_eq!(refused(&hooks(&out, &[])), (Some(1), older));
}

#[test]
fn of_several_nodes_runs_the_agent_of_this_host_is_asked() {
    let dir = tempfile::tempdir().unwrap();
    let both = dir.path().join("both");
    // A run each in runs/x/a and runs/x/b, of one job of two ranks.
    let agents: Vec<Agent> = ["a", "b"]
        .into_iter()
        .map(|node| {
            let folder = dir.path().join(node);
            fs::create_dir_all(&folder).unwrap();
            fs::create_dir_all(&both).unwrap();
            let agent = Agent::with(&folder, &["--read-only"]);
            std::os::unix::fs::symlink(&agent.out, both.join(node)).unwrap();
            agent
        })
        .collect();
    let (code, line) = refused(&hooks(&both, &["add", "layers.0"]));
    assert!(code == Some(1) && line.contains("no rank has attached"), "{line}");
    let ranks: Vec<Rank> =
        agents.iter().zip(0..).map(|(agent, rank)| Rank::attached(agent, rank, 2, 1 << 20)).collect();
    wait_until("what both runs know of the job", || agents.iter().all(|agent| info(&agent.out)["world"] == 2));
    let mut elsewhere = lock(&agents[0].out);
    elsewhere["node"] = json!("elsewhere");
    say(&agents[0].out, &elsewhere);
    let (code, line) = refused(&hooks(&both, &["add", "layers.0"]));
    assert!(code == Some(1) && line.contains("--read-only"), "{line}");
    say(&agents[1].out, &elsewhere);
    let (_, line) = refused(&hooks(&both, &["add", "layers.0"]));
    assert!(line.contains("are on host elsewhere and 1 other"), "{line}");
    drop(ranks);
}

/// What a job is told of its hooks by `flexmodel run`; else why there is no job.
fn told(folder: &Path, given: Option<&str>, inherited: Option<&str>) -> Result<String, String> {
    let home = folder.join("home");
    fs::create_dir_all(&home).unwrap();
    for name in ["libflexmodel.so", "libflexmodel_engine.so"] {
        fs::write(home.join(name), "").unwrap();
    }
    let out = folder.join("run");
    let _ = fs::remove_dir_all(&out);
    let mut command = Command::new(env!("CARGO_BIN_EXE_flexmodel"));
    command.args(["run", "--out"]).arg(&out);
    given.iter().for_each(|hooks| _ = command.args(["--hooks", hooks]));
    command.args(["--", "bash", "-c", "echo \"[${FLEXMODEL_HOOKS-unset}]\""]);
    command.env("FLEXMODEL_HOME", home).env_remove("FLEXMODEL_HOOKS").env_remove("FLEXMODEL_DISABLE");
    inherited.iter().for_each(|hooks| _ = command.env("FLEXMODEL_HOOKS", hooks));
    let done = command.stdin(Stdio::null()).output().unwrap();
    let (out, err) = (String::from_utf8(done.stdout).unwrap(), String::from_utf8(done.stderr).unwrap());
    if done.status.success() { Ok(out.trim_end().to_owned()) } else { Err(err) }
}

#[test]
fn hooks_that_are_set_but_empty_arm_a_job() {
    let dir = tempfile::tempdir().unwrap();
    for (given, inherited, expected) in [
        (Some(""), None, "[]"),
        (Some(" "), None, "[]"),
        (Some(""), Some("a"), "[]"),
        (None, Some(""), "[]"),
        (Some("b"), Some(""), "[b]"),
        (None, Some("a"), "[a]"),
    ] {
        assert_eq!(told(dir.path(), given, inherited).as_deref(), Ok(expected), "{given:?} {inherited:?}");
    }
    let why = told(dir.path(), None, None).unwrap_err();
    assert!(why.contains("--hooks '' to add them while the job runs"), "{why}");
    assert!(told(dir.path(), Some(";"), None).is_err());
}
