//! Ranks with more than one slab, and that every tensor that was begun has exactly one line.

mod rank;

use std::{io::Write, os::unix::net::UnixStream, sync::atomic::Ordering};

use rank::*;
use wire::{
    control::{self, FromAgent, ToAgent},
    slab::SlabWriter,
};

const SLAB: u64 = 1 << 20;

/// Follows the rank's slab with a larger one; the one before.
fn grow(rank: &mut Rank) -> SlabWriter {
    let bytes = 2 * rank.slab.mapping().ring_len();
    let before = std::mem::replace(&mut rank.slab, SlabWriter::create(bytes, rank.rank).unwrap());
    announce(rank.stream.as_ref().unwrap(), &rank.slab);
    before
}

fn announce(stream: &UnixStream, slab: &SlabWriter) {
    let message = ToAgent::Slab { id: slab.mapping().header().id };
    send_with_fd(stream, &control::encode(&message).unwrap(), slab.mapping());
}

/// Begins a tensor of several pieces and sends the first.
fn begin(slab: &mut SlabWriter, step: u64) -> u64 {
    let mut encoded = Vec::new();
    meta("begun", step, 100).encode(&mut encoded);
    let number = slab.begin_record();
    send(slab, number, &encoded, step, 0);
    number
}

/// Sends one of the ten pieces of such a tensor.
fn send(slab: &mut SlabWriter, number: u64, encoded: &[u8], step: u64, at: usize) {
    let slot = slab.try_reserve(number, encoded, at as u64, 640, 6400).unwrap();
    let bytes = bytes_of(&meta("begun", step, 100));
    // SAFETY: the reservation owns 640 bytes.
    unsafe { std::ptr::copy_nonoverlapping(bytes[at..].as_ptr(), slot.payload(), 640) };
    slot.commit();
}

fn end(slab: &mut SlabWriter, number: u64, step: u64) {
    (640..6400).step_by(640).for_each(|at| send(slab, number, &[], step, at));
}

/// Bytes of slabs that the agent has mapped.
fn mapped(agent: &Agent) -> u64 {
    let maps = std::fs::read_to_string(format!("/proc/{}/maps", agent.child.id())).unwrap();
    let size = |line: &str| {
        let (start, end) = line.split_once(' ')?.0.split_once('-')?;
        Some(u64::from_str_radix(end, 16).ok()? - u64::from_str_radix(start, 16).ok()?)
    };
    maps.lines().filter(|line| line.contains("memfd:flexmodel-slab")).filter_map(size).sum()
}

fn settled(slab: &SlabWriter) {
    wait_until("a settled slab", || slab.is_settled());
}

/// SLAB-7, SLAB-8.
#[test]
fn a_tensor_ends_in_the_slab_where_it_began_while_others_go_through_the_next() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::start(dir.path());
    let out = agent.out.clone();
    let mut rank = Rank::attached(&agent, 0, 1, SLAB);
    rank.ship("a", 0, 3);
    let number = begin(&mut rank.slab, 1);
    rank.count_dropped(0);
    let mut before = grow(&mut rank);
    rank.ship("a", 2, 3);
    rank.drained();
    end(&mut before, number, 1);
    assert!(!before.is_settled());
    before.complete();
    settled(&before);
    wait_until("the first slab to be unmapped", || mapped(&agent) == rank.slab.mapping().whole().1 as u64);
    rank.ship("a", 3, 3);
    rank.stream = None;
    agent.finish();
    verify(&out);
    assert_eq!((total(&out, "parts"), total(&out, "dropped")), (4, 0));
    for part in parts(&out) {
        let rows = part["shape"][0].as_u64().unwrap();
        let record = meta(part["module"].as_str().unwrap(), part["step"].as_u64().unwrap(), rows);
        assert_eq!(bytes_at(&out, &part), bytes_of(&record));
    }
}

#[test]
fn what_is_lost_is_counted_for_each_slab() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::start(dir.path());
    let out = agent.out.clone();
    let mut rank = Rank::attached(&agent, 0, 1, SLAB);
    let mut before = Vec::new();
    for n in 1..=3 {
        rank.ship("a", n, 3);
        (0..n).for_each(|_| _ = rank.slab.begin_record());
        rank.count_dropped(n);
        before.push(grow(&mut rank));
        before.last().unwrap().complete();
    }
    before.iter().for_each(settled);
    rank.slab.begin_record();
    rank.count_dropped(1);
    rank.stream = None;
    agent.finish();
    assert_eq!((total(&out, "parts"), total(&out, "dropped")), (3, 1 + 2 + 3 + 1));
}

/// STORE-5.
#[test]
fn a_killed_agents_successor_is_told_of_every_slab() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::start(dir.path());
    let out = agent.out.clone();
    let mut rank = Rank::attached(&agent, 0, 1, SLAB);
    let mut slabs = Vec::new();
    for step in 0..300 {
        rank.ship("a", step, 8);
        if step % 100 == 50 {
            rank.slab.begin_record();
            rank.count_dropped(1);
            slabs.push(grow(&mut rank));
        }
        if step == 160 {
            wait_until("some parts", || agent.parts() > 20);
        }
    }
    agent.kill();
    let agent = Agent::start(dir.path());
    slabs.iter().for_each(SlabWriter::complete);
    assert_eq!(rank.attach(&agent.socket), FromAgent::Welcome);
    slabs.iter().for_each(|slab| announce(rank.stream.as_ref().unwrap(), slab));
    slabs.iter().for_each(settled);
    rank.drained();
    // It comes over another connection once more, though it was settled.
    assert_eq!(rank.attach(&agent.socket), FromAgent::Welcome);
    slabs.iter().for_each(|slab| announce(rank.stream.as_ref().unwrap(), slab));
    rank.say(&ToAgent::Bye);
    rank.stream = None;
    agent.finish();
    verify(&out);
    assert_eq!((parts(&out).len(), total(&out, "dropped")), (300, 3), "each exactly once");
}

/// The line of a tensor in pieces was written, and its last frame not released.
#[test]
fn a_tensor_in_pieces_that_is_journalled_is_not_lost_as_well() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::start(dir.path());
    let out = agent.out.clone();
    let mut rank = Rank::attached(&agent, 0, 1, SLAB);
    let number = begin(&mut rank.slab, 0);
    rank.drained();
    (640..5760).step_by(640).for_each(|at| send(&mut rank.slab, number, &[], 0, at));
    rank.drained();
    let header = rank.slab.mapping().clone();
    let tail = header.header().tail.load(Ordering::Acquire);
    send(&mut rank.slab, number, &[], 0, 5760);
    rank.drained();
    agent.kill();
    header.header().tail.store(tail, Ordering::Release);
    let agent = Agent::start(dir.path());
    assert_eq!(rank.attach(&agent.socket), FromAgent::Welcome);
    rank.ship("a", 1, 3);
    rank.stream = None;
    agent.finish();
    verify(&out);
    assert_eq!((total(&out, "parts"), total(&out, "dropped")), (2, 0));
}

/// SLAB-9: each of the threads of a job that was killed was in the middle of a tensor.
#[test]
fn all_tensors_that_were_under_way_are_lost() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::start(dir.path());
    let out = agent.out.clone();
    let mut rank = Rank::attached(&agent, 0, 1, SLAB);
    let mut before = (0..3).map(|step| begin(&mut rank.slab, step)).collect::<Vec<_>>();
    let first = grow(&mut rank);
    before.extend((3..5).map(|step| begin(&mut rank.slab, step)));
    rank.slab.begin_record();
    rank.ship("a", 0, 3);
    rank.drained();
    rank.stream = None;
    agent.finish();
    drop(first);
    assert_eq!((total(&out, "parts"), total(&out, "dropped")), (1, 3 + 2 + 1));
}

/// The agent was killed in the middle of a tensor that the job then gave up: one loss, not two.
#[test]
fn a_tensor_that_both_sides_lost_is_lost_once() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::start(dir.path());
    let out = agent.out.clone();
    let mut rank = Rank::attached(&agent, 0, 1, SLAB);
    let number = begin(&mut rank.slab, 0);
    rank.drained();
    agent.kill();
    send(&mut rank.slab, number, &[], 0, 640);
    rank.count_dropped(1);
    let agent = Agent::start(dir.path());
    assert_eq!(rank.attach(&agent.socket), FromAgent::Welcome);
    rank.ship("a", 1, 3);
    rank.stream = None;
    agent.finish();
    assert_eq!((total(&out, "parts"), total(&out, "dropped")), (1, 1));
}

/// It is asked to end while the rank goes on; the next one takes what is in the slab.
#[test]
fn an_agent_that_is_stopped_counts_nothing_that_the_next_one_finds() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::start(dir.path());
    let out = agent.out.clone();
    let mut rank = Rank::attached(&agent, 0, 1, SLAB);
    rank.ship("a", 0, 3);
    agent.finish();
    rank.ship("a", 1, 3);
    let agent = Agent::start(dir.path());
    assert_eq!(rank.attach(&agent.socket), FromAgent::Welcome);
    rank.stream = None;
    agent.finish();
    verify(&out);
    assert_eq!((total(&out, "parts"), total(&out, "dropped")), (2, 0));
}

#[test]
fn a_rank_that_was_not_taken_in_tells_what_it_lost() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::start(dir.path());
    let out = agent.out.clone();
    let bytes = control::encode(&ToAgent::Lost { rank: 5, count: 240 }).unwrap();
    UnixStream::connect(&agent.socket).unwrap().write_all(&bytes).unwrap();
    agent.finish();
    assert_eq!(total(&out, "dropped"), 240);
    let line = &lines(&out, "dropped")[0];
    assert_eq!((&line["rank"], &line["count"]), (&5.into(), &240.into()));
}

/// AGENT-4.
#[test]
fn a_slab_that_is_not_the_one_told_of_is_refused_and_what_was_there_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::start(dir.path());
    let out = agent.out.clone();
    let mut rank = Rank::attached(&agent, 0, 1, SLAB);
    rank.ship("a", 0, 3);
    let other = SlabWriter::create(SLAB, 0).unwrap();
    let bytes = control::encode(&ToAgent::Slab { id: 1 }).unwrap();
    send_with_fd(rank.stream.as_ref().unwrap(), &bytes, other.mapping());
    let FromAgent::Refused(why) = answer(rank.stream.as_ref().unwrap()) else { panic!("taken") };
    assert!(why.contains("rank 0") && why.contains("not the slab"), "{why}");
    // And one without a descriptor.
    assert_eq!(rank.attach(&agent.socket), FromAgent::Welcome);
    rank.say(&ToAgent::Slab { id: 1 });
    assert!(
        matches!(answer(rank.stream.as_ref().unwrap()), FromAgent::Refused(why) if why.contains("no shared memory"))
    );
    rank.drained();
    agent.finish();
    verify(&out);
    assert_eq!((total(&out, "parts"), total(&out, "dropped")), (1, 0));
}
