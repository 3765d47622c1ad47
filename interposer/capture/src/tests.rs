//! Captures from tap to agent, in one process: what arrives, what is counted as lost, and when nothing happens.

use std::{
    io::Write,
    time::{Duration, Instant},
};

use wire::{
    codes::{Refusal, Role},
    control::{FromAgent, Question, ToAgent, encode},
    counts::Counts,
    env::{MIN_SLAB_BYTES, OnFull},
    hooks::Kind,
    record::RecordMeta,
    slab::{Fetched, SlabReader},
};

use super::*;
use crate::testing::{Agent, BRIDGE, Folder, Model, StandInProcess, Tensor, heard, hello, plan_of, training};

/// A bound for hangs.
const HANG: Duration = Duration::from_secs(30);

struct World {
    folder: Folder,
    process: Arc<StandInProcess>,
    counts: Counts,
    capture: Capture,
}

fn capture(hooks: &str, on_full: OnFull) -> World {
    let (folder, process, counts) = (Folder::new(), StandInProcess::on(), Counts::create().unwrap());
    let settings = Settings {
        socket: folder.path("s").to_str().unwrap().to_owned(),
        slab_bytes: MIN_SLAB_BYTES,
        counts: Counts::open(&counts.name("agent"), "agent"),
        hello: hello(on_full),
    };
    let capture = Capture::new(HookPlan::parse(0, hooks).unwrap(), settings, process.clone(), &BRIDGE);
    World { folder, process, counts, capture }
}

impl World {
    fn select(&self, model: &Model, rank: u32, world: u32) -> u32 {
        model.select_in(&mut self.capture.engine(), rank, world)[0].tap
    }

    /// A pass of the model in which one module gives this tensor.
    fn pass(&self, tap: u32, tensor: &Tensor, refusal: Refusal) {
        let call = {
            let mut engine = self.capture.engine();
            engine.pass(1, 0, true, &training());
            let call = engine.triggered(tap, &training()).unwrap();
            engine.pass(1, 0, false, &training());
            call
        };
        let sizes = [tensor.floats.len() as i64];
        let described = tensor.described(Kind::Forward, "out", &sizes, refusal);
        // SAFETY: sizes and path live through the call.
        unsafe { self.capture.capture(&call, &described) };
    }

    fn counted(&self) -> u64 {
        self.counts.by_rank().values().sum()
    }
}

/// All that is in a slab: records and bytes.
fn read(reader: &mut SlabReader) -> Vec<(RecordMeta, Vec<u8>)> {
    let mut out: Vec<(RecordMeta, Vec<u8>)> = Vec::new();
    while let Fetched::Frame(frame) = reader.fetch().unwrap() {
        if frame.piece_offset == 0 {
            out.push((RecordMeta::decode(&frame.meta).unwrap(), Vec::new()));
        }
        out.last_mut().unwrap().1.extend_from_slice(frame.payload);
        reader.release().unwrap();
    }
    out
}

/// Tensors begun in a slab, and those of them that are lost.
fn begun_and_lost(reader: &SlabReader) -> (u64, u64) {
    use std::sync::atomic::Ordering::Relaxed;
    let header = reader.mapping().header();
    (header.begun.load(Relaxed), header.dropped.load(Relaxed))
}

#[test]
fn a_leaf_arrives_as_its_record_and_bytes() {
    let w = capture("a", OnFull::Wait);
    let agent = Agent::at(&w.folder.path("s"));
    let tap = w.select(&Model::of(1, &["", "a"]), 0, 1);
    // More than a quarter of the slab: it comes in pieces.
    let tensor = Tensor::of(100_000);
    w.pass(tap, &tensor, Refusal::None);
    let (_stream, messages, memory) = agent.accept();
    assert!(messages.iter().any(|m| matches!(m, ToAgent::Model { model: 0, .. })), "{messages:?}");
    let records = read(&mut SlabReader::attach(memory.unwrap()).unwrap());
    let (meta, bytes) = &records[0];
    assert_eq!((records.len(), meta.module.as_str(), meta.shape.as_slice()), (1, "a", &[100_000][..]));
    let expected: Vec<u8> = tensor.floats.iter().flat_map(|float| float.to_le_bytes()).collect();
    assert_eq!((bytes == &expected, w.counted()), (true, 1));
}

#[test]
fn what_there_is_no_room_for_while_no_agent_is_there_is_lost_and_counted() {
    for on_full in [OnFull::Wait, OnFull::Drop] {
        let w = capture("a", on_full);
        let tap = w.select(&Model::of(1, &["", "a"]), 0, 1);
        (0..10).for_each(|_| w.pass(tap, &Tensor::of(50_000), Refusal::None));
        let agent = Agent::at(&w.folder.path("s"));
        w.capture.finish();
        let (_stream, _, memory) = agent.accept();
        let mut reader = SlabReader::attach(memory.unwrap()).unwrap();
        let whole = |(meta, bytes): &(RecordMeta, Vec<u8>)| meta.payload_len() == Some(bytes.len() as u64);
        let arrived = read(&mut reader).iter().filter(|one| whole(one)).count() as u64;
        let (begun, lost) = begun_and_lost(&reader);
        assert!(arrived > 2 && lost > 2, "{arrived} arrived, {lost} lost");
        assert_eq!((begun, arrived + lost, w.counted()), (10, 10, 10));
    }
}

#[test]
fn a_tensor_that_cannot_be_copied_is_lost_and_one_that_is_refused_says_why() {
    let w = capture("a", OnFull::Wait);
    let agent = Agent::at(&w.folder.path("s"));
    let tap = w.select(&Model::of(1, &["", "a"]), 0, 1);
    w.pass(tap, &Tensor { fails: true, ..Tensor::of(4) }, Refusal::None);
    w.pass(tap, &Tensor::of(4), Refusal::Sparse);
    let mut reader = SlabReader::attach(agent.accept().2.unwrap()).unwrap();
    let records = read(&mut reader);
    assert_eq!((records.len(), records[0].0.refused.as_str()), (1, Refusal::Sparse.reason()));
    assert!(records[0].1.is_empty());
    assert_eq!(begun_and_lost(&reader), (2, 1));
}

#[test]
fn a_process_that_becomes_another_rank_begins_another_slab_and_counts_what_nobody_saw() {
    let w = capture("a", OnFull::Wait);
    let model = Model::of(1, &["", "a"]);
    let tap = w.select(&model, 0, 1);
    (0..3).for_each(|_| w.pass(tap, &Tensor::of(4), Refusal::None));
    assert_eq!(w.select(&model, 1, 2), tap);
    let agent = Agent::at(&w.folder.path("s"));
    w.pass(tap, &Tensor::of(4), Refusal::None);
    w.capture.finish();
    let (_stream, messages, memory) = agent.accept();
    let hello = messages.iter().find_map(|m| if let ToAgent::Hello(h) = m { Some(h) } else { None });
    assert_eq!(hello.map(|h| (h.rank, h.world)), Some((1, 2)));
    let mut reader = SlabReader::attach(memory.unwrap()).unwrap();
    assert_eq!(read(&mut reader).iter().map(|(meta, _)| meta.rank).collect::<Vec<_>>(), [1]);
    assert_eq!(begun_and_lost(&reader), (4, 3), "those of before are lost");
    assert_eq!(w.counts.by_rank(), [(0, 3), (1, 1)].into());
}

#[test]
fn what_is_to_be_gathered_goes_to_its_own_agent_where_there_is_no_communicator() {
    let w = capture("a@assemble=collective", OnFull::Wait);
    let agent = Agent::at(&w.folder.path("s"));
    let model = Model { mesh: vec![("dp", 0, 2, Role::Data)], ..Model::of(1, &["", "a"]) };
    let tap = w.select(&model, 0, 2);
    w.pass(tap, &Tensor::of(4), Refusal::None);
    assert_eq!(w.counted(), 0, "it waits for the others' parts");
    w.capture.gather().per_rank("the ranks do not find each other");
    w.pass(tap, &Tensor::of(4), Refusal::None);
    let (_stream, messages, memory) = agent.accept();
    assert_eq!(read(&mut SlabReader::attach(memory.unwrap()).unwrap()).len(), 2);
    let said = |m: &ToAgent| matches!(m, ToAgent::Notice(t) if t.contains("find each"));
    assert_eq!(messages.iter().filter(|m| said(m)).count(), 1);
}

/// A thread listens.
#[test]
fn a_rank_in_a_long_step_answers_all_the_same() {
    let w = capture("a@every=1000", OnFull::Wait);
    let agent = Agent::at(&w.folder.path("s"));
    let tap = w.select(&Model::of(1, &["", "a"]), 0, 1);
    w.pass(tap, &Tensor::of(4), Refusal::None);
    let (mut stream, _, _memory) = agent.accept();
    w.capture.engine().replace_plan(HookPlan::parse(4, "b; c").unwrap());
    let question = encode(&FromAgent::Ask { id: 9, question: Question::Plan }).unwrap();
    stream.write_all(&question).unwrap();
    let expected = ToAgent::Answer { id: 9, answer: plan_of(4, &["b", "c"]) };
    let (begun, mut said) = (Instant::now(), Vec::new());
    while !said.contains(&expected) {
        assert!(begun.elapsed() < HANG, "it never answered: {said:?}");
        std::thread::sleep(Duration::from_millis(1));
        said.extend(heard(&mut stream));
    }
}

/// FORK-1: the child of a fork finds the switch off, and nothing of ours is asked there.
#[test]
fn a_process_whose_switch_is_off_is_not_captured_in() {
    let w = capture("a", OnFull::Wait);
    assert!(w.capture.if_on().is_some());
    assert!(w.process.switch.turn_off());
    assert!(w.capture.if_on().is_none());
    w.process.off("said by nobody");
    assert!(w.process.lines.lock().unwrap().is_empty());
}
