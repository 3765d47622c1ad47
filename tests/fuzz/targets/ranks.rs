//! Ranks come, say and do what they like, and go. The agent lives, its tables are bounded, and an honest rank beside them
//! has all of its records stored (AGENT-4).
#![no_main]
use flexmodel_fuzz::ranks::{Agent, Honest, Other};
use libfuzzer_sys::{arbitrary::Unstructured, fuzz_target};

fuzz_target!(|bytes: &[u8]| {
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = folder.path().join("run");
    let agent = Agent::start(&path);
    let mut honest = Honest::attach(&agent);
    let mut others: [Other; 3] = Default::default();
    let mut input = Unstructured::new(bytes);
    while !input.is_empty() {
        let Ok(who) = input.int_in_range(0..=others.len()) else { break };
        match others.get_mut(who) {
            // What is left of the input is too short for another step.
            Some(other) => _ = other.act(&agent, &mut input),
            None if honest.steps() < 50 => honest.ship(),
            None => {}
        }
    }
    honest.ship();
    let steps = honest.leave();
    agent.finish(&path, steps);
    others.into_iter().for_each(Other::end);
});
