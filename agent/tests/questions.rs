//! The agent asks ranks over a real socket, and they answer, do not, or lie.

mod rank;

use std::{io::Write, os::unix::net::UnixStream};

use rank::*;
use wire::{
    control::{Answer, FromAgent, Question, StepRule, ToAgent, encode},
    revision::Since,
};

const SLAB: u64 = 1 << 20;

/// A rank that has been asked for its plan, with the number of the question.
fn asked(agent: &Agent, rank: u32, world: u32) -> (Rank, u64) {
    let mut rank = Rank::new(rank, world, SLAB);
    let stream = UnixStream::connect(&agent.socket).unwrap();
    send_with_fd(&stream, &encode(&ToAgent::Hello(rank.hello())).unwrap(), rank.slab.mapping());
    let mut inbox = Vec::new();
    assert_eq!(hear(&stream, &mut inbox, |word| !matches!(word, FromAgent::InForce(_))), FromAgent::Welcome);
    let FromAgent::Ask { id, question: Question::Plan } = hear(&stream, &mut inbox, |_| true) else {
        panic!("another word")
    };
    rank.stream = Some(stream);
    (rank, id)
}

fn plan(id: u64, revision: u64) -> ToAgent {
    says(id, revision, vec!["layers.*.mlp".into()], vec![1])
}

fn says(id: u64, revision: u64, clauses: Vec<String>, ids: Vec<u32>) -> ToAgent {
    let since = Since { rule: StepRule::Optimizer, begins: Some(3) };
    ToAgent::Answer { id, answer: Answer::Plan { revision, since, heard: revision, open: None, clauses, ids } }
}

#[test]
fn ranks_whose_plans_have_different_revisions_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::start(dir.path());
    let out = agent.out.clone();
    for (number, revision) in [(0, 4), (1, 4), (2, 5)] {
        let (mut rank, id) = asked(&agent, number, 3);
        rank.say(&plan(id, revision));
        rank.ship("a", 0, 3);
        rank.drained();
        // It stays attached.
        std::mem::forget(rank);
    }
    let mut notices = Vec::new();
    wait_until("the notice", || {
        notices = info(&out)["notices"].as_array().unwrap().clone();
        !notices.is_empty()
    });
    let text = notices[0].as_str().unwrap();
    assert!(text.contains("rank 2 has revision 5") && text.contains("has revision 4"), "{notices:?}");
    assert_eq!(notices.len(), 1, "{notices:?}");
}

/// AGENT-4.
#[test]
fn answers_that_nobody_asked_for_and_none_at_all_cost_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::start(dir.path());
    let out = agent.out.clone();
    let (mut liar, id) = asked(&agent, 0, 2);
    for wrong in (0..1000).filter(|number| *number != id) {
        liar.say(&plan(wrong, wrong));
    }
    let many = vec!["x".repeat(100); 100_000];
    liar.say(&says(id, 0, many, Vec::new()));
    liar.say(&plan(id, 7));
    let (mut silent, _) = asked(&agent, 1, 2);
    for rank in [&mut liar, &mut silent] {
        rank.ship("a", 0, 3);
        rank.drained();
    }
    agent.finish();
    verify(&out);
    assert_eq!((parts(&out).len(), info(&out)["notices"].as_array().unwrap().len()), (2, 0));
}

#[test]
fn a_word_of_another_version_is_no_answer() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::start(dir.path());
    let (rank, id) = asked(&agent, 0, 1);
    let mut bytes = encode(&plan(id, 0)).unwrap();
    // A variant that there is not.
    let at = bytes.iter().position(|&b| b == 8).unwrap();
    bytes[at] = 200;
    rank.stream.as_ref().unwrap().write_all(&bytes).unwrap();
    wait_until("the notice", || !info(&agent.out)["notices"].as_array().unwrap().is_empty());
}
