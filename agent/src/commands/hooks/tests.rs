//! The command line, what is printed, and the client against a dashboard with a job that is played.

use std::{
    io::Write as _,
    net::TcpListener as StdListener,
    path::Path,
    sync::{Arc, Mutex},
};

use clap::Parser;
use flexmodel_run::format::RunInfo;
use tokio::net::TcpListener;
use wire::{hooks::parse_clauses, revision::Clause};

use super::{find::Agent, *};
use crate::{
    cli::exit_code_of,
    dashboard::{
        Served,
        hooks::{Changer, Later},
        serve,
    },
    live::Live,
    server::changes::{Op, Pending, Refused},
};

const TOKEN: &str = "0123456789abcdef";

#[derive(Debug, Parser)]
struct Line {
    #[command(flatten)]
    args: Args,
}

fn parsed(words: &[&str]) -> Result<(Option<Asked>, bool), String> {
    let line = Line::try_parse_from(["hooks"].iter().chain(words)).map_err(|e| e.to_string())?;
    let Args { change, job, json, .. } = line.args;
    Ok((change.map(|change| change.asked(job)), json))
}

#[test]
fn the_change_comes_behind_the_run_and_options_anywhere() {
    assert_eq!(parsed(&["runs/x"]).unwrap(), (None, false));
    assert_eq!(parsed(&["runs/x", "--json"]).unwrap(), (None, true));
    let add = |job| Some(Asked::Add { clauses: "a:forward;b".into(), job });
    assert_eq!(parsed(&["runs/x", "add", "a:forward;b"]).unwrap(), (add(None), false));
    assert_eq!(parsed(&["--job", "2", "runs/x", "add", "a:forward;b"]).unwrap(), (add(Some(2)), false));
    assert_eq!(parsed(&["runs/x", "add", "a:forward;b", "--json", "--job", "2"]).unwrap(), (add(Some(2)), true));
    let remove = Some(Asked::Remove { ids: vec![1, 12], job: None });
    assert_eq!(parsed(&["runs/x", "remove", "1", "12"]).unwrap(), (remove, false));
    let set = Some(Asked::Set { clauses: String::new(), job: None });
    assert_eq!(parsed(&["runs/x", "set", ""]).unwrap(), (set, false));
    for wrong in [
        &[][..],
        &["runs/x", "add"],
        &["runs/x", "add", "a", "b"],
        &["runs/x", "remove"],
        &["runs/x", "remove", "a"],
        &["runs/x", "remove", "-1"],
        &["runs/x", "clear"],
        &["runs/x", "--job", "x"],
    ] {
        assert!(parsed(wrong).is_err(), "{wrong:?}");
    }
}

#[test]
fn what_is_printed() {
    let clause = |id, text: &str| Clause { id, text: text.into() };
    let mut hooks = Hooks {
        job: 0,
        revision: 3,
        clauses: vec![clause(1, "layers.*.mlp"), clause(12, "lm_head\n")],
        ranks: 8,
        pending: None,
    };
    let table = "job 0, revision 3, 8 ranks\nid  clause\n 1  layers.*.mlp\n12  lm_head\\n\n";
    assert_eq!(listing(&hooks), table);
    hooks.pending = Some(Pending { revision: 4, step: Some(120) });
    assert_eq!(listing(&hooks), format!("{table}pending: revision 4 from step 120 on\n"));
    hooks.clauses.clear();
    hooks.pending = None;
    assert_eq!(listing(&hooks), "job 0, revision 3, 8 ranks\nnothing is tapped\n");
    let mut changed = Changed { revision: 3, step: Some(120), ranks: 8, notes: Vec::new() };
    assert_eq!(outcome(&changed), "revision 3 from step 120 on, 8 ranks");
    (changed.step, changed.ranks) = (None, 1);
    assert_eq!(outcome(&changed), "revision 3 from each rank's next pass on, 1 rank");
}

/// A job of one plan that always does what it is told, at once.
#[derive(Clone, Default)]
struct Played(Arc<Mutex<(u64, Vec<Clause>)>>);

impl Changer for Played {
    fn hooks(&self, job: Option<u32>) -> Later<Hooks> {
        let (revision, clauses) = self.0.lock().unwrap().clone();
        Box::pin(async move {
            let job = job.unwrap_or_default();
            let pending = Some(Pending { revision: revision + 1, step: None });
            if job > 1 {
                Err(Refused::Conflict(format!("no job {job} runs")))
            } else {
                Ok(Hooks { job, revision, clauses, ranks: 2, pending })
            }
        })
    }

    fn change(&self, _: Option<u32>, op: Op) -> Later<Changed> {
        let plan = self.0.clone();
        Box::pin(async move {
            let mut plan = plan.lock().unwrap();
            match op {
                Op::Add(text) | Op::Set(text) => {
                    let hooks = parse_clauses(&text).map_err(|e| Refused::Bad(e.to_string()))?;
                    let next = plan.1.len() as u32 + 1;
                    plan.1.extend(hooks.into_iter().zip(next..).map(|(hook, id)| Clause { id, text: hook.text }));
                }
                Op::Remove(ids) => plan.1.retain(|clause| !ids.contains(&clause.id)),
            }
            plan.0 += 1;
            Ok(Changed { revision: plan.0, step: Some(120), ranks: 2, notes: vec!["compiled again".into()] })
        })
    }
}

/// An agent of a job that is played, or of a run that is over.
fn agent(changer: Option<Played>, read_only: bool) -> Agent {
    let std = StdListener::bind("127.0.0.1:0").unwrap();
    std.set_nonblocking(true).unwrap();
    let port = std.local_addr().unwrap().port();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let served = Served {
                live: Live::new(RunInfo::default()),
                run_dir: PathBuf::new(),
                token: TOKEN.into(),
                changer: changer.map(|played| Box::new(played) as Box<dyn Changer>),
                read_only,
            };
            serve(TcpListener::from_std(std).unwrap(), served).await.unwrap();
        });
    });
    Agent { run: "runs/x".into(), port, token: TOKEN.into() }
}

fn add(text: &str) -> Asked {
    Asked::Add { clauses: text.into(), job: None }
}

/// The exit code and the line.
fn refusal(answer: anyhow::Result<Box<RawValue>>) -> (u8, String) {
    let error = answer.unwrap_err();
    (exit_code_of(&error), format!("{error:#}"))
}

#[test]
fn hooks_are_changed_and_listed_over_http() {
    let agent = agent(Some(Played::default()), false);
    let answer = ask::change(&agent, &add("layers.*.mlp; lm_head@every=2")).unwrap();
    assert_eq!(answer.get(), r#"{"revision":1,"step":120,"ranks":2,"notes":["compiled again"]}"#);
    let answer = ask::hooks(&agent, None).unwrap();
    let clauses = r#"[{"id":1,"text":"layers.*.mlp"},{"id":2,"text":"lm_head@every=2"}]"#;
    let told =
        format!(r#"{{"job":0,"revision":1,"clauses":{clauses},"ranks":2,"pending":{{"revision":2,"step":null}}}}"#);
    assert_eq!(answer.get(), told);
    ask::change(&agent, &Asked::Remove { ids: vec![1], job: None }).unwrap();
    let hooks: Hooks = read(&ask::hooks(&agent, Some(1)).unwrap()).unwrap();
    assert_eq!((hooks.job, hooks.revision, hooks.clauses[0].id), (1, 2, 2));
    assert_eq!(refusal(ask::hooks(&agent, Some(9))), (1, "no job 9 runs".into()));
}

#[test]
fn a_mistake_in_a_clause_is_one_of_usage_and_what_the_agent_refuses_is_not() {
    let changed = agent(Some(Played::default()), false);
    for text in ["layers:forwad", "", "hooks.toml", "/etc/hooks.toml", "a;../hooks.toml", "runs/x"] {
        let (code, line) = refusal(ask::change(&changed, &add(text)));
        assert_eq!((code, line.contains('\n')), (2, false), "{line}");
    }
    let (code, line) = refusal(ask::change(&agent(Some(Played::default()), true), &add("a")));
    assert!(code == 1 && line.contains("--read-only"), "{line}");
    assert!(ask::hooks(&agent(Some(Played::default()), true), None).is_ok());
    assert_eq!(refusal(ask::change(&agent(None, false), &add("a"))), (1, "this run is over".into()));
    assert_eq!(refusal(ask::hooks(&agent(None, false), None)), (1, "this run is over".into()));
    let stranger = Agent { token: "x".into(), ..changed };
    assert!(refusal(ask::change(&stranger, &add("a"))).1.contains("token"));
}

#[test]
fn whoever_else_listens_there_is_not_believed() {
    let nobody = StdListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let at = |port| Agent { run: Path::new("runs/x").to_owned(), port, token: TOKEN.into() };
    let (code, line) = refusal(ask::hooks(&at(nobody), None));
    assert!(code == 1 && line.contains(&format!("does not answer on 127.0.0.1:{nobody}")), "{line}");
    let endless = format!("HTTP/1.1 200 OK\r\nContent-Length: 9999999\r\n\r\n{}", " ".repeat(2 << 20));
    for said in [
        "SSH-2.0-x\r\n",
        "",
        "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nno",
        "HTTP/1.1 302 Found\r\nLocation: http://elsewhere/\r\nContent-Length: 0\r\n\r\n",
        "HTTP/1.1 409 Conflict\r\nContent-Length: 2\r\n\r\n{}",
        "HTTP/1.1 409 Conflict\r\nContent-Length: 54\r\n\r\n{\"error\":\"the agent of runs/x\\n\\u001b[2Jis another's\"}",
        &endless,
    ] {
        let listener = StdListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let said = said.to_owned();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            // It is read no further than it has to be.
            let _ = stream.write_all(said.as_bytes());
        });
        let (code, line) = refusal(ask::hooks(&at(port), None));
        assert!(code == 1 && line.starts_with("the agent of runs/x") && !line.contains(['\n', '\u{1b}']), "{line}");
    }
}
