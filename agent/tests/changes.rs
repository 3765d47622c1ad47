//! `flexmodel hooks` with ranks that confirm, refuse, leave, or say nothing.

mod rank;

use std::{
    collections::VecDeque,
    io::Write,
    os::fd::{AsFd, OwnedFd},
    path::Path,
    process::{Command, Output, Stdio},
    sync::{Arc, Mutex},
    thread::{self, JoinHandle},
};

use rank::*;
use serde_json::{Value, json};
use wire::{
    control::{Answer, FromAgent, Question, StepRule, ToAgent, decode_next, encode},
    passing,
    register::SharedRegister,
    revision::{Moment, Proposal, Register, Since, Verdict},
};

const SLAB: u64 = 1 << 20;

/// What a rank does with a proposal.
#[derive(Clone, Debug)]
enum Does {
    Confirm,
    Refuse(&'static str),
    /// It ends the connection.
    Leave,
    /// It comes to the step first.
    Abandon,
}

/// What a rank has in force, and what it was sent.
#[derive(Debug)]
struct State {
    revision: u64,
    heard: u64,
    clauses: Vec<(u32, String)>,
    next: u64,
    does: VecDeque<Does>,
    got: Vec<(Proposal, SharedRegister)>,
    /// It was asked for its plan.
    is_known: bool,
}

impl State {
    fn new(does: &[Does]) -> Self {
        Self {
            revision: 0,
            heard: 0,
            clauses: vec![(1, "a".into())],
            next: 5,
            does: does.iter().cloned().collect(),
            got: Vec::new(),
            is_known: false,
        }
    }
}

/// A rank that answers, as long as its connection lasts.
struct Answering {
    state: Arc<Mutex<State>>,
    thread: JoinHandle<()>,
}

impl Answering {
    fn start(agent: &Agent, rank: u32, world: u32, does: &[Does]) -> Self {
        Self::go_on(agent, rank, world, Arc::new(Mutex::new(State::new(does))))
    }

    fn go_on(agent: &Agent, rank: u32, world: u32, state: Arc<Mutex<State>>) -> Self {
        let mut made = Rank::new(rank, world, SLAB);
        // What is in force is told before the welcome.
        match made.attach(&agent.socket) {
            FromAgent::InForce(plan) => assert_eq!(plan.revision, state.lock().unwrap().heard),
            welcome => assert_eq!((welcome, state.lock().unwrap().heard), (FromAgent::Welcome, 0)),
        }
        Self::answer(made, state)
    }

    /// Of a rank that is attached. The agent knows it once it has asked for its plan.
    fn answer(mut made: Rank, state: Arc<Mutex<State>>) -> Self {
        let its = state.clone();
        let thread = thread::spawn(move || {
            let (mut inbox, mut fds) = (Vec::new(), VecDeque::new());
            let mut stream = made.stream.take().unwrap();
            stream.set_nonblocking(false).unwrap();
            loop {
                while let Some(message) = decode_next::<FromAgent>(&mut inbox).unwrap() {
                    let FromAgent::Ask { id, question } = message else { continue };
                    let Some(answer) = answered(&mut its.lock().unwrap(), question, &mut fds) else { return };
                    if stream.write_all(&encode(&ToAgent::Answer { id, answer }).unwrap()).is_err() {
                        return;
                    }
                }
                let mut fd = None;
                match passing::receive(stream.as_fd(), &mut inbox, 4096, &mut fd) {
                    Ok(0) => return,
                    Ok(_) => fds.extend(fd),
                    Err(_) => thread::sleep(std::time::Duration::from_millis(1)),
                }
            }
        });
        wait_until("the first question", || state.lock().unwrap().is_known);
        Self { state, thread }
    }

    /// The proposals that came, with what their registers say.
    fn got(&self) -> Vec<(u64, Option<u64>, Verdict)> {
        let state = self.state.lock().unwrap();
        state.got.iter().map(|(p, register)| (p.plan.revision, p.begins, register.peek())).collect()
    }

    /// It begins the last proposal, as its register says.
    fn turn(&self) {
        let mut state = self.state.lock().unwrap();
        let (proposal, register) = state.got.pop().unwrap();
        assert_eq!(register.settle(Verdict::Abandoned), Some(Verdict::Commit));
        state.revision = proposal.plan.revision;
        state.clauses = proposal.plan.clauses.into_iter().map(|clause| (clause.id, clause.text)).collect();
    }
}

fn answered(state: &mut State, question: Question, fds: &mut VecDeque<OwnedFd>) -> Option<Answer> {
    state.is_known |= matches!(question, Question::Plan);
    Some(match question {
        Question::Plan => Answer::Plan {
            revision: state.revision,
            since: Since { rule: StepRule::Optimizer, begins: Some(state.next) },
            heard: state.heard,
            open: state.got.last().map(|(proposal, _)| proposal.plan.revision),
            clauses: state.clauses.iter().map(|(_, text)| text.clone()).collect(),
            ids: state.clauses.iter().map(|(id, _)| *id).collect(),
        },
        Question::Moment => {
            Answer::Moment(Moment { rule: StepRule::Optimizer, next: state.next, pace_ns: 0, together: true })
        }
        Question::Prepare(proposal, _) => {
            let register = SharedRegister::attach(fds.pop_front().unwrap()).unwrap();
            state.heard = proposal.plan.revision;
            let does = state.does.pop_front().unwrap_or(Does::Confirm);
            if matches!(does, Does::Abandon) {
                register.settle(Verdict::Abandoned);
            }
            state.got.push((proposal, register));
            match does {
                Does::Confirm | Does::Abandon => Answer::Prepare(Ok(())),
                Does::Refuse(why) => Answer::Prepare(Err(why.into())),
                Does::Leave => return None,
            }
        }
        Question::Store(_) => return None,
    })
}

fn command(run: &Path, words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_flexmodel"));
    command.arg("hooks").arg(run).args(words).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn hooks(run: &Path, words: &[&str]) -> Output {
    command(run, words).output().unwrap()
}

fn told(run: &Path, words: &[&str]) -> Value {
    let done = hooks(run, &[words, &["--json"]].concat());
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    serde_json::from_slice(&done.stdout).unwrap()
}

fn refused(done: &Output) -> String {
    assert!(!done.status.success() && done.stdout.is_empty());
    String::from_utf8(done.stderr.clone()).unwrap()
}

/// A folder with an agent in it, whose page can be asked.
fn agent() -> (tempfile::TempDir, Agent) {
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::start(dir.path());
    agent.page();
    wait_until("the port", || std::fs::read_to_string(agent.out.join("agent.lock")).unwrap().contains("port"));
    (dir, agent)
}

#[test]
fn what_all_ranks_confirm_begins_on_all_and_is_in_the_manifest() {
    let (_dir, agent) = agent();
    let ranks: Vec<Answering> = (0..3).map(|rank| Answering::start(&agent, rank, 3, &[])).collect();
    let out = &agent.out;
    assert_eq!(told(out, &["add", "b:grad; c"]), json!({"revision": 1, "step": 7, "ranks": 3, "notes": []}));
    for rank in &ranks {
        assert_eq!(rank.got(), [(1, Some(7), Verdict::Commit)]);
    }
    let pending = told(out, &[]);
    assert_eq!((&pending["revision"], &pending["pending"]), (&json!(0), &json!({"revision": 1, "step": 7})));
    ranks[0].turn();
    // One that comes before that has begun on all ranks waits for it.
    let next = command(out, &["remove", "2", "1", "--json"]).spawn().unwrap();
    ranks[1].turn();
    ranks[2].turn();
    let next = next.wait_with_output().unwrap();
    let clauses = json!([{"id": 1, "text": "a"}, {"id": 2, "text": "b:grad"}, {"id": 3, "text": "c"}]);
    assert_eq!(serde_json::from_slice::<Value>(&next.stdout).unwrap()["revision"], 2);
    assert_eq!(told(out, &[])["clauses"], clauses);
    ranks.iter().for_each(Answering::turn);
    assert_eq!(told(out, &["set", "d"])["revision"], 3);
    let lines = lines(out, "revision");
    let said: Vec<_> = lines.iter().map(|line| &line["revision"]).collect();
    assert_eq!(said, [&json!(1), &json!(2), &json!(3)]);
    assert_eq!((&lines[0]["begins"], &lines[0]["ranks"], &lines[0]["clauses"]), (&json!(7), &json!(3), &clauses));
    assert_eq!(lines[2]["clauses"], json!([{"id": 4, "text": "d"}]), "no number is given twice");
}

#[test]
fn a_proposal_that_came_too_late_for_a_rank_is_made_again_further_ahead() {
    let (_dir, agent) = agent();
    let late = Answering::start(&agent, 0, 2, &[Does::Refuse("is past step 7 already"), Does::Abandon]);
    let other = Answering::start(&agent, 1, 2, &[]);
    assert_eq!(told(&agent.out, &["add", "b"]), json!({"revision": 3, "step": 37, "ranks": 2, "notes": []}));
    assert_eq!(late.got().len(), 3);
    let verdicts = [Verdict::Abandoned, Verdict::Abandoned, Verdict::Commit];
    assert_eq!(other.got().iter().map(|got| got.2).collect::<Vec<_>>(), verdicts);
    // One that never confirms is named.
    let (_dir, agent) = self::agent();
    let _other = Answering::start(&agent, 0, 2, &[]);
    let _no = Answering::start(
        &agent,
        1,
        2,
        &[Does::Refuse("has no room"), Does::Refuse("has no room"), Does::Refuse("has no room")],
    );
    assert!(refused(&hooks(&agent.out, &["add", "b"])).contains("nothing is changed: rank 1 has no room"));
    assert!(lines(&agent.out, "revision").is_empty());
}

#[test]
fn a_rank_that_leaves_or_was_never_there_leaves_all_as_it_was() {
    let (_dir, agent) = agent();
    let first = Answering::start(&agent, 0, 2, &[]);
    assert!(refused(&hooks(&agent.out, &["add", "b"])).contains("rank 1 is not attached"), "not all 2 are there");
    let gone = Answering::start(&agent, 1, 2, &[Does::Leave]);
    assert!(refused(&hooks(&agent.out, &["add", "b"])).contains("rank 1 has left"));
    gone.thread.join().unwrap();
    wait_until("what the other rank was sent", || !first.got().is_empty());
    assert_eq!(first.got(), [(1, Some(7), Verdict::Abandoned)]);
    let (_dir, empty) = self::agent();
    assert!(refused(&hooks(&empty.out, &[])).contains("no rank is attached"));
}

#[test]
fn of_several_jobs_the_one_that_is_said_changes_its_hooks() {
    let (_dir, agent) = agent();
    let ranks = [0u32, 1].map(|job| {
        let mut made = Rank::new(0, 1, SLAB);
        let mut hello = made.hello();
        (hello.pid, hello.job.group) = (hello.pid + job, 1 + u64::from(job));
        assert_eq!(made.attach_as(&agent.socket, hello), FromAgent::Welcome);
        Answering::answer(made, Arc::new(Mutex::new(State::new(&[]))))
    });
    let why = refused(&hooks(&agent.out, &["add", "b"]));
    assert!(why.contains("several jobs are running in this run: 0, 1; say which with --job"), "{why}");
    assert_eq!(told(&agent.out, &["add", "b", "--job", "1"])["revision"], 1);
    assert_eq!(told(&agent.out, &["add", "c", "--job", "0"])["revision"], 1);
    ranks.iter().for_each(Answering::turn);
    for (job, clause) in [("0", "c"), ("1", "b")] {
        assert_eq!(told(&agent.out, &["--job", job])["clauses"][1], json!({"id": 2, "text": clause}));
    }
    let lines = lines(&agent.out, "revision");
    assert_eq!(lines.iter().map(|line| line["job"].as_u64().unwrap_or_default()).collect::<Vec<_>>(), [1, 0]);
}

/// Those of which one could not hear what was decided, and to which nothing more is to begin.
#[test]
fn ranks_that_differ_are_named_and_made_alike_by_a_whole_plan() {
    let (_dir, agent) = agent();
    let ranks: Vec<Answering> = (0..2).map(|rank| Answering::start(&agent, rank, 2, &[])).collect();
    assert_eq!(told(&agent.out, &["add", "b"])["revision"], 1);
    ranks[0].turn();
    ranks[1].state.lock().unwrap().got.clear();
    let why = refused(&hooks(&agent.out, &["add", "c"]));
    assert!(why.contains("rank 1 has revision 0, rank 0 has revision 1 of the hooks"), "{why}");
    assert!(why.contains("hooks RUN set CLAUSES"), "{why}");
    assert_eq!(told(&agent.out, &["set", "d"])["revision"], 2);
    ranks.iter().for_each(Answering::turn);
    assert_eq!(told(&agent.out, &["add", "e"])["revision"], 3);
    // Where no rank began what was decided, the hooks are what all have.
    ranks.iter().for_each(|rank| rank.state.lock().unwrap().got.clear());
    assert_eq!(told(&agent.out, &["add", "f"])["revision"], 4);
    ranks.iter().for_each(Answering::turn);
    let texts: Vec<Value> =
        told(&agent.out, &[])["clauses"].as_array().unwrap().iter().map(|c| c["text"].clone()).collect();
    assert_eq!(texts, ["d", "f"]);
}

/// One that an agent did not live to tell of, or that an attempt began with.
#[test]
fn a_revision_that_a_rank_has_is_in_the_manifest_whoever_decided_it() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::start(dir.path());
    let mut made = Rank::new(0, 1, SLAB);
    let clauses = vec![(2, "b".into()), (5, "c:grad".into())];
    let state = State { revision: 3, heard: 3, clauses, next: 9, ..State::new(&[]) };
    assert_eq!(made.attach(&agent.socket), FromAgent::Welcome);
    let _rank = Answering::answer(made, Arc::new(Mutex::new(state)));
    wait_until("the line", || !lines(&agent.out, "revision").is_empty());
    let [line] = lines(&agent.out, "revision").try_into().unwrap();
    assert_eq!((&line["revision"], &line["begins"], &line["ranks"]), (&json!(3), &json!(9), &json!(1)));
    assert_eq!(line["clauses"], json!([{"id": 2, "text": "b"}, {"id": 5, "text": "c:grad"}]));
}

#[test]
fn a_name_that_no_module_has_is_noted() {
    let (_dir, agent) = agent();
    let mut made = Rank::new(0, 1, SLAB);
    assert_eq!(made.attach(&agent.socket), FromAgent::Welcome);
    let modules = ["", "layers", "layers.0", "layers.0.mlp", "lm_head"].map(str::to_owned).to_vec();
    made.say(&ToAgent::Others { modules });
    let rank = Answering::answer(made, Arc::new(Mutex::new(State::new(&[]))));
    let notes =
        &told(&agent.out, &["add", "layers.*.mpl; lm_head; lm_haed.weight:grad; class=Nothing; **.mlp"])["notes"];
    let note = "'layers.*.mpl' matches none of the modules that this agent knows of; nearest: layers.*.mlp";
    assert_eq!(notes.as_array().unwrap().len(), 1, "{notes}");
    assert!(notes[0].as_str().unwrap().starts_with(note), "{notes}");
    rank.turn();
}

#[test]
fn what_cannot_be_read_is_refused_before_any_rank_hears_of_it() {
    let (_dir, agent) = agent();
    let rank = Answering::start(&agent, 0, 1, &[]);
    for (words, why) in [
        (&["add", "b:nothing"][..], "nothing"),
        (&["add", ""], "empty"),
        (&["add", "b|edit.py:f"], "Python edits"),
        (&["set", "hooks.toml"], "hooks.toml"),
        (&["remove", "9"], "no clause has the id 9; there are 1"),
    ] {
        let done = hooks(&agent.out, words);
        assert_eq!(done.status.code(), Some(2), "{words:?}");
        assert!(refused(&done).contains(why), "{words:?} {done:?}");
    }
    assert!(refused(&hooks(&agent.out, &["add", "b", "--job", "4"])).contains("job 4"));
    assert!(rank.got().is_empty());
}

#[test]
fn of_two_commands_at_once_one_changes_the_hooks_and_the_other_is_told() {
    let (_dir, agent) = agent();
    let ranks: Vec<Answering> = (0..2).map(|rank| Answering::start(&agent, rank, 2, &[])).collect();
    // Nobody answers while this is held.
    let held = ranks[1].state.lock().unwrap();
    let mut both = ["b", "c"].map(|clause| command(&agent.out, &["add", clause]).spawn().unwrap());
    wait_until("one that is told", || both.iter_mut().any(|each| each.try_wait().unwrap().is_some()));
    drop(held);
    let mut done = both.map(|each| each.wait_with_output().unwrap());
    done.sort_by_key(|each| each.status.code());
    assert!(done[0].status.success(), "{done:?}");
    assert!(refused(&done[1]).contains("another command is changing the hooks"), "{done:?}");
    assert_eq!(lines(&agent.out, "revision").len(), 1);
}

#[test]
fn an_agent_that_follows_another_goes_on_where_that_was() {
    let (dir, agent) = agent();
    let ranks: Vec<Answering> = (0..2).map(|rank| Answering::start(&agent, rank, 2, &[])).collect();
    assert_eq!(told(&agent.out, &["set", "b; c"])["revision"], 1);
    ranks.iter().for_each(Answering::turn);
    assert_eq!(told(&agent.out, &["remove", "3"])["revision"], 2);
    drop(agent);
    let states: Vec<_> = ranks.iter().map(|rank| rank.state.clone()).collect();
    ranks.into_iter().for_each(|rank| rank.thread.join().unwrap());
    // What was decided begins, whoever is gone.
    assert_eq!(states[0].lock().unwrap().got[0].1.peek(), Verdict::Commit);
    let again = Agent::start(dir.path());
    again.page();
    let ranks: Vec<Answering> =
        (0..).zip(states).map(|(rank, state)| Answering::go_on(&again, rank, 2, state)).collect();
    ranks.iter().for_each(Answering::turn);
    wait_until("the port", || std::fs::read_to_string(again.out.join("agent.lock")).unwrap().contains("port"));
    assert_eq!(told(&again.out, &[])["revision"], 2);
    assert_eq!(told(&again.out, &["add", "d"])["revision"], 3);
    ranks.iter().for_each(Answering::turn);
    let clauses = json!([{"id": 2, "text": "b"}, {"id": 4, "text": "d"}]);
    assert_eq!(told(&again.out, &[])["clauses"], clauses, "the number of what was removed is not given again");
}
