//! The link against sockets that behave and that do not.

use std::{
    io::{Read, Write},
    os::{
        fd::{AsFd, AsRawFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::Path,
};

use wire::{
    control::StepRule,
    control::{self, FromAgent, MAX_QUESTIONS, ModuleInfo, Question, decode_next, encode},
    dtype::DType,
    env::{MIN_SLAB_BYTES, OnFull},
    passing,
    register::SharedRegister,
    revision::{Plan, Proposal, Register, Verdict},
    slab::{Fetched, Mapping, SlabReader, SlabWriter},
    store::Place,
};

use super::*;
use crate::testing::{BRIDGE, Folder, StandInProcess, Tensor, heard, hello, plan_of};

/// A listener and the link of a rank that looks for it.
struct Pair {
    folder: Folder,
    listener: UnixListener,
    link: Link,
    slabs: Slabs,
}

fn slabs() -> Slabs {
    let mut slabs = Slabs::new(MIN_SLAB_BYTES, Memory::new(1));
    slabs.begin(0).unwrap();
    slabs
}

fn link_to(socket: &Path) -> Link {
    Link::new(socket.to_str().unwrap(), hello(OnFull::Wait), StandInProcess::on())
}

fn pair() -> Pair {
    let folder = Folder::new();
    let listener = UnixListener::bind(folder.path("s")).unwrap();
    let link = link_to(&folder.path("s"));
    Pair { folder, listener, link, slabs: slabs() }
}

impl Pair {
    fn alive(&mut self) -> bool {
        self.link.alive(&self.slabs)
    }

    /// Looks, and answers what was asked.
    fn answer(&mut self) {
        assert!(self.alive());
        while let Some(heard) = self.link.next_heard() {
            let Heard::Question { connection, id, question: Question::Plan, .. } = heard else { panic!() };
            let answer = plan_of(0, &["*"]);
            self.link.answer(connection, ToAgent::Answer { id, answer }, &self.slabs);
        }
    }

    /// When the pause is over.
    fn retry(&mut self) -> bool {
        self.link.tried = None;
        self.alive()
    }
}

fn modules(count: usize) -> Vec<ModuleInfo> {
    let module = |n| ModuleInfo { name: format!("experts.with_a_long_name.{n}"), class: "Linear".into(), kinds: 0 };
    (0..count).map(module).collect()
}

fn rank(rank: u32, world: u32) -> Rank {
    Rank { rank, world, group: 0 }
}

fn hellos(messages: &[ToAgent]) -> Vec<(u32, u32)> {
    let hello = |m: &ToAgent| if let ToAgent::Hello(h) = m { Some((h.rank, h.world)) } else { None };
    messages.iter().filter_map(hello).collect()
}

/// An agent that was stopped before it took anybody in: connecting to it would wait for ever.
#[test]
fn an_agent_whose_queue_is_full_is_absent() {
    let mut pair = pair();
    // SAFETY: a listening socket may be given another length of its queue.
    assert_eq!(unsafe { libc::listen(pair.listener.as_raw_fd(), 0) }, 0);
    let mut queued = Vec::new();
    while let Ok(stream) = socket::connect(&pair.folder.path("s")) {
        queued.push(stream);
    }
    assert!(!pair.alive());
    for _ in &queued {
        pair.listener.accept().unwrap();
    }
    assert!(pair.retry(), "it goes on");
}

/// A stopped agent takes connections and what fits into the socket, and reads nothing.
#[test]
fn a_message_that_a_stopped_agent_does_not_take_waits_on_one_connection() {
    let mut pair = pair();
    pair.link.say(ToAgent::Model { model: 0, modules: modules(50_000) }, &pair.slabs);
    for _ in 0..50 {
        assert!(pair.alive(), "it is stopped and not gone");
        pair.link.say(ToAgent::Model { model: 0, modules: modules(50_000) }, &pair.slabs);
        pair.link.tend(&pair.slabs);
    }
    let (mut agent, _) = pair.listener.accept().unwrap();
    pair.listener.set_nonblocking(true).unwrap();
    assert!(pair.listener.accept().is_err(), "it was attached to once");
    // Now it goes on, and gets everything, once.
    let mut bytes = Vec::new();
    agent.set_nonblocking(true).unwrap();
    let mut messages: Vec<ToAgent> = Vec::new();
    while messages.len() < 2 {
        let _ = agent.read_to_end(&mut bytes);
        while let Some(message) = decode_next(&mut bytes).unwrap() {
            messages.push(message);
        }
        assert!(pair.alive());
    }
    assert!(
        matches!(&messages[..], [ToAgent::Hello(_), ToAgent::Model { model: 0, modules }] if modules.len() == 50_000)
    );
    assert!(bytes.is_empty() && heard(&mut agent).is_empty());
}

#[test]
fn an_agent_that_takes_us_in_and_is_gone_is_tried_ever_less_often() {
    let mut pair = pair();
    let mut before = link::LOOK;
    for _ in 0..10 {
        assert!(pair.retry());
        assert_eq!(pair.link.pause, (before * 2).min(link::MAX_PAUSE));
        before = pair.link.pause;
        drop(pair.listener.accept().unwrap());
        assert!(!pair.alive(), "not before the pause is over");
    }
}

/// It closes without reading the hello, so the connection ends with an error.
#[test]
fn the_last_word_of_an_agent_that_has_left_is_heard() {
    let mut pair = pair();
    assert!(pair.alive());
    let (mut agent, _) = pair.listener.accept().unwrap();
    agent.write_all(&encode(&FromAgent::Welcome).unwrap()).unwrap();
    agent.write_all(&encode(&FromAgent::Refused("no".repeat(1000))).unwrap()).unwrap();
    drop(agent);
    assert!(!pair.alive());
    pair.listener.set_nonblocking(true).unwrap();
    assert!(!pair.retry() && pair.listener.accept().is_err(), "it was refused and asks no more");
}

#[test]
fn an_agent_that_talks_without_end_is_left() {
    let mut pair = pair();
    assert!(pair.alive());
    let (mut agent, _) = pair.listener.accept().unwrap();
    agent.set_nonblocking(true).unwrap();
    let endless = [&(1_u32 << 24).to_le_bytes()[..], &[7; 1 << 16]].concat();
    assert!(agent.write(&endless).unwrap() > control::MAX_FROM_AGENT);
    assert!(!pair.alive());
    assert_eq!(agent.write(&[7]).unwrap_err().kind(), std::io::ErrorKind::BrokenPipe);
    // Many that are short are no reason to leave; each look hears some of them.
    assert!(pair.retry());
    let (mut agent, _) = pair.listener.accept().unwrap();
    agent.write_all(&encode(&FromAgent::Welcome).unwrap().repeat(control::MAX_FROM_AGENT / 4)).unwrap();
    for _ in 0..20 {
        assert!(pair.alive());
    }
}

#[test]
fn a_welcomed_agent_that_dies_is_looked_for_at_once() {
    let mut pair = pair();
    for _ in 0..3 {
        assert!(pair.retry());
        let (mut agent, _) = pair.listener.accept().unwrap();
        agent.write_all(&encode(&FromAgent::Welcome).unwrap()).unwrap();
        assert!(pair.alive());
        assert_eq!(pair.link.pause, link::LOOK);
    }
}

#[test]
fn what_becomes_known_late_is_said_on_the_same_connection() {
    let mut pair = pair();
    pair.link.describe(rank(0, 1), "", &pair.slabs);
    assert!(pair.alive());
    pair.link.describe(rank(0, 1), "", &pair.slabs);
    pair.link.describe(rank(0, 2), "DDP", &pair.slabs);
    let (mut agent, _) = pair.listener.accept().unwrap();
    assert_eq!(hellos(&heard(&mut agent)), [(0, 1), (0, 2)]);
}

fn state(link: Link, slabs: Slabs) -> State {
    State::new(link, slabs, None, OnFull::Wait, StandInProcess::on())
}

impl State {
    fn describe(&mut self, rank: Rank) {
        self.link.describe(rank, "", &self.slabs);
    }

    /// A tensor of the CPU begins.
    fn begin_here(&mut self, total: u64) -> Option<(InFlight, Option<Reservation>)> {
        self.begin(false, b"meta", total)
    }

    fn current(&mut self) -> Arc<Mapping> {
        self.slabs.current().unwrap().mapping().clone()
    }
}

/// A process that captured before it knew its rank.
#[test]
fn another_rank_is_another_slab_after_a_goodbye() {
    let Pair { folder: _folder, listener, link, slabs } = pair();
    let mut state = state(link, slabs);
    state.describe(rank(0, 1));
    let old = state.current();
    state.link.say(ToAgent::Notice("said before".into()), &state.slabs);
    state.leave_slabs();
    state.describe(rank(1, 2));
    assert!(state.make_slab());
    let new = state.current();
    assert!(!Arc::ptr_eq(&old, &new) && new.header().rank == 1);
    assert!(state.link.alive(&state.slabs));
    let [mut first, mut second] = [(); 2].map(|()| listener.accept().unwrap().0);
    let first = heard(&mut first);
    assert_eq!(hellos(&first), [(0, 1)]);
    assert_eq!(first.last(), Some(&ToAgent::Bye));
    let second = heard(&mut second);
    assert_eq!(hellos(&second), [(1, 2)]);
    assert_eq!(second.last(), Some(&ToAgent::Notice("said before".into())));
}

#[test]
fn what_no_agent_saw_of_the_slab_before_is_counted_in_the_next() {
    let folder = Folder::new();
    let mut state = state(link_to(&folder.path("absent")), slabs());
    state.slabs.current().unwrap().begin_record();
    state.slabs.current().unwrap().begin_record();
    state.leave_slabs();
    assert!(state.make_slab());
    let map = state.current();
    let header = map.header();
    assert_eq!((header.dropped.load(Ordering::Relaxed), header.begun.load(Ordering::Relaxed)), (2, 2));
}

/// A tensor of 100,000 bytes, whole; the slab that it went to if there was room.
fn send(state: &mut State) -> Option<Arc<Mapping>> {
    let (record, slot) = state.begin_here(100_000).unwrap();
    slot.map(|slot| {
        slot.commit();
        record.map
    })
}

fn slabs_told(messages: &[ToAgent]) -> Vec<u64> {
    messages.iter().filter_map(|m| if let ToAgent::Slab { id } = m { Some(*id) } else { None }).collect()
}

#[test]
fn a_full_slab_that_an_agent_reads_is_followed_by_one_that_it_is_told_of() {
    let Pair { folder: _folder, listener, link, .. } = pair();
    let mut slabs = Slabs::new(4 << 20, Memory::new(1));
    slabs.begin(0).unwrap();
    let mut state = state(link, slabs);
    let first = state.current();
    while let Some(map) = send(&mut state) {
        assert!(Arc::ptr_eq(&map, &first));
    }
    assert!(Arc::ptr_eq(&state.current(), &first), "nobody reads it");
    let mut reader = SlabReader::attach(first.fd().unwrap().try_clone_to_owned().unwrap()).unwrap();
    assert!(matches!(reader.fetch().unwrap(), Fetched::Frame(_)));
    reader.release().unwrap();
    drop(first);
    while state.slabs.live().count() == 1 {
        send(&mut state);
    }
    let second = state.current();
    assert_eq!((second.whole().1, second.header().head.load(Ordering::Relaxed) > 0), (2 << 20, true));
    assert!(reader.is_complete());
    let (mut agent, _) = listener.accept().unwrap();
    assert_eq!(slabs_told(&heard(&mut agent)), [second.header().id]);
    // An agent that comes later hears of both, the first with its hello.
    drop(agent);
    assert!(!state.link.alive(&state.slabs), "not before the pause is over");
    state.link.tried = None;
    assert!(state.link.alive(&state.slabs));
    let (mut agent, _) = listener.accept().unwrap();
    let messages = heard(&mut agent);
    assert!(matches!(messages[..2], [ToAgent::Hello(_), ToAgent::Slab { .. }]), "{messages:?}");
    // And one that comes when the first is settled, of the second alone.
    reader.settle();
    send(&mut state);
    drop(agent);
    state.link.alive(&state.slabs);
    state.link.tried = None;
    assert!(state.link.alive(&state.slabs));
    let (mut agent, _) = listener.accept().unwrap();
    assert!(slabs_told(&heard(&mut agent)).is_empty());
}

#[test]
fn a_rank_without_memory_counts_what_it_cannot_send_and_asks_rarely() {
    let folder = Folder::new();
    let slabs = Slabs::new(MIN_SLAB_BYTES, Memory::new(u32::MAX));
    let mut state = state(link_to(&folder.path("absent")), slabs);
    for _ in 0..3 {
        assert!(state.begin_here(64).is_none());
    }
    assert!(state.slabs.news.take().unwrap().contains("captures are dropped"));
    state.slabs.shared_by(1);
    assert!(state.begin_here(64).is_none(), "asked for again at once");
    assert!(state.slabs.news.is_none() && state.unseen == 4);
    state.refused = None;
    assert!(state.begin_here(64).is_some());
    let map = state.current();
    assert_eq!((map.header().begun.load(Ordering::Relaxed), map.header().dropped.load(Ordering::Relaxed)), (5, 4));
}

/// It is refused, so that no message of its own connection arrives.
#[test]
fn a_refused_rank_leaves_word_of_all_it_captured() {
    let Pair { folder: _folder, listener, link, slabs } = pair();
    let mut state = state(link, slabs);
    assert!(send(&mut state).is_some());
    let (mut agent, _) = listener.accept().unwrap();
    agent.write_all(&encode(&FromAgent::Refused("no".into())).unwrap()).unwrap();
    assert!(!state.link.alive(&state.slabs));
    assert!(send(&mut state).is_some());
    state.finish();
    let (mut word, _) = listener.accept().unwrap();
    assert_eq!(heard(&mut word), [ToAgent::Lost { rank: 0, count: 2 }]);
}

/// OPEN-1 before there is anything to attach with.
#[test]
fn the_last_word_of_a_process_without_a_slab_is_a_notice_alone() {
    let mut pair = pair();
    let none = Slabs::new(MIN_SLAB_BYTES, Memory::new(1));
    pair.link.last_words("rank 3: taps are off: no bridge", &none, GLANCE);
    let (mut agent, _) = pair.listener.accept().unwrap();
    assert_eq!(heard(&mut agent), [ToAgent::Notice("rank 3: taps are off: no bridge".into())]);
}

/// What a job does that closes descriptors it does not know.
fn close_memory(slab: &SlabWriter) {
    let number = slab.mapping().fd().unwrap().as_raw_fd();
    // SAFETY: the slab notices that its descriptor is gone.
    unsafe { libc::close(number) };
}

#[test]
fn a_slab_whose_descriptor_the_job_has_closed_is_followed_by_another_and_what_was_begun_in_it_is_told() {
    let Pair { folder: _folder, listener, link, slabs } = pair();
    let mut state = state(link, slabs);
    let old = state.slabs.current().unwrap().mapping().header().id;
    for _ in 0..3 {
        state.slabs.current().unwrap().begin_record();
    }
    close_memory(state.slabs.current().unwrap());
    assert!(send(&mut state).is_some());
    let new = state.slabs.current().unwrap();
    assert_ne!(new.mapping().header().id, old, "an agent is there, and cannot be given the old one");
    assert_eq!((state.slabs.live().count(), state.slabs.current().unwrap().begun()), (1, 1));
    let [mut nothing, mut agent] = [(); 2].map(|()| listener.accept().unwrap().0);
    assert_eq!(heard(&mut nothing), []);
    let messages = heard(&mut agent);
    assert_eq!(hellos(&messages).len(), 1);
    assert!(messages.contains(&ToAgent::OutOfReach { id: old, begun: 3 }), "{messages:?}");
}

#[test]
fn a_slab_whose_descriptor_the_job_has_closed_is_kept_while_no_agent_is_there() {
    let Pair { folder, listener, link, slabs } = pair();
    drop((listener, folder));
    let mut state = state(link, slabs);
    let old = state.slabs.current().unwrap().mapping().header().id;
    close_memory(state.slabs.current().unwrap());
    assert!(send(&mut state).is_some());
    assert_eq!(state.slabs.current().unwrap().mapping().header().id, old);
}

#[test]
fn a_connection_that_the_job_has_closed_is_made_again_in_silence() {
    let mut pair = pair();
    assert!(pair.alive());
    let (first, _) = pair.listener.accept().unwrap();
    pair.link.close_by_job();
    drop(first);
    assert!(!pair.alive(), "not before the pause is over");
    assert!(!pair.link.missing, "the agent is not gone");
    assert!(pair.retry());
    assert_eq!(hellos(&heard(&mut pair.listener.accept().unwrap().0)).len(), 1);
}

/// What an agent asks.
fn ask(agent: &mut UnixStream, ids: impl IntoIterator<Item = u64>) {
    let question = |id| encode(&FromAgent::Ask { id, question: Question::Plan }).unwrap();
    let all: Vec<u8> = ids.into_iter().flat_map(question).collect();
    agent.write_all(&all).unwrap();
}

fn answers_of(messages: &[ToAgent]) -> Vec<u64> {
    messages.iter().filter_map(|m| if let ToAgent::Answer { id, .. } = m { Some(*id) } else { None }).collect()
}

#[test]
fn a_rank_answers_each_question_by_its_number_when_it_looks() {
    let mut pair = pair();
    assert!(pair.alive());
    let (mut agent, _) = pair.listener.accept().unwrap();
    agent.write_all(&encode(&FromAgent::Welcome).unwrap()).unwrap();
    ask(&mut agent, [7, 5, u64::MAX]);
    assert!(answers_of(&heard(&mut agent)).is_empty());
    pair.answer();
    assert_eq!(answers_of(&heard(&mut agent)), [7, 5, u64::MAX]);
}

#[test]
fn a_descriptor_goes_with_the_proposal_that_it_was_sent_with() {
    let mut pair = pair();
    assert!(pair.alive());
    let (agent, _) = pair.listener.accept().unwrap();
    let proposal = |revision| Proposal {
        plan: Plan { revision, ..Plan::default() },
        base: Some(0),
        rule: StepRule::Optimizer,
        begins: None,
    };
    let mut registers = Vec::new();
    for revision in [1, 2] {
        let (register, fd) = SharedRegister::create().unwrap();
        let ask = FromAgent::Ask { id: revision, question: Question::Prepare(proposal(revision), Place::Shared) };
        let ask = encode(&ask).unwrap();
        assert_eq!(passing::send(agent.as_fd(), &ask, Some(fd.as_fd())).unwrap(), ask.len());
        registers.push(register);
    }
    assert!(pair.alive());
    registers[1].settle(Verdict::Commit);
    for said in [Verdict::Open, Verdict::Commit] {
        let Some(Heard::Question { fd: Some(fd), .. }) = pair.link.next_heard() else { panic!() };
        assert_eq!(SharedRegister::attach(fd).unwrap().peek(), said);
    }
}

/// It may have [`MAX_QUESTIONS`] open.
#[test]
fn an_agent_that_asks_without_end_gets_a_bounded_number_of_answers_a_look() {
    let mut pair = pair();
    assert!(pair.alive());
    let (mut agent, _) = pair.listener.accept().unwrap();
    for _ in 0..3 {
        ask(&mut agent, 0..500);
        pair.answer();
        assert_eq!(answers_of(&heard(&mut agent)).len(), MAX_QUESTIONS);
        while !answers_of(&heard(&mut agent)).is_empty() {
            pair.answer();
        }
    }
}

#[test]
fn what_an_agent_asked_that_died_is_not_answered_to_the_next() {
    let mut pair = pair();
    assert!(pair.alive());
    let (mut agent, _) = pair.listener.accept().unwrap();
    ask(&mut agent, [3]);
    drop(agent);
    assert!(!pair.alive());
    assert!(pair.retry());
    pair.answer();
    assert!(answers_of(&heard(&mut pair.listener.accept().unwrap().0)).is_empty());
}

#[test]
fn no_slab_for_a_device_is_made_in_the_middle_of_a_graph_that_the_job_captures() {
    let settings = Settings { socket: String::new(), slab_bytes: 4 << 20, counts: None, hello: hello(OnFull::Drop) };
    let transport = Transport::new(settings, StandInProcess::on(), &BRIDGE);
    let slabs = |captured| {
        let tensor = Tensor { captured, ..Tensor::of(4) };
        transport.send(Captured {
            meta: RecordMeta::output("m", DType::Float32, vec![4]),
            handle: std::ptr::from_ref(&tensor).cast(),
            on_device: true,
            staged: false,
            collective: false,
            replicas_once: false,
            cut: None,
        });
        transport.lock().slabs.live().count()
    };
    assert_eq!(slabs(true), 1, "the one that tensors of the CPU would have");
    assert_eq!(slabs(false), 2);
}
