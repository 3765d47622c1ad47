use std::fs;

use proptest::prelude::*;
use wire::{
    dtype::DType,
    passes::{Group, Pass, runs},
};

use super::{Local, Passes, Verdict};
use crate::{
    Run,
    format::{Identity, JobId, Joined, Line, MANIFEST_FILE},
    manifest::encode_line,
    read::{Growing, Record},
    testing::fixture::*,
};

const WORLD: u32 = 3;

/// What a job does next.
#[derive(Clone, Copy, Debug)]
enum Event {
    /// All ranks, through the wrapper; whether gradients are reduced after it.
    Train(bool),
    /// All ranks, without gradients; whether a collective is called in it.
    Evaluate(bool),
    /// One rank alone: it trains, and through the wrapper.
    Alone(u32, bool, bool),
    /// All ranks call a collective.
    Collective,
    /// All optimizers step.
    Step,
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        3 => any::<bool>().prop_map(Event::Train),
        2 => any::<bool>().prop_map(Event::Evaluate),
        2 => (0..WORLD, any::<bool>()).prop_map(|(rank, train)| Event::Alone(rank, train, false)),
        // Did all ranks do so, nobody could tell these passes from such that they make together.
        1 => Just(Event::Alone(0, true, true)),
        1 => Just(Event::Collective),
        2 => Just(Event::Step),
    ]
}

/// A rank as it counts.
#[derive(Default)]
struct Counting {
    step: u64,
    stepped: bool,
    micro: [u32; 2],
    clock: u64,
    /// Passes of each kind since the last collective.
    since: [u32; 4],
}

impl Counting {
    fn collective(&mut self) {
        self.clock += 1;
        self.since = [0; 4];
    }

    /// A pass of this rank, and its identity.
    fn pass(&mut self, train: bool, reduces: bool, together: bool) -> (Pass, Identity) {
        if std::mem::take(&mut self.stepped) {
            self.step += 1;
            self.micro = [0; 2];
        }
        let (micro, since) =
            (&mut self.micro[usize::from(train)], &mut self.since[usize::from(train) + 2 * usize::from(reduces)]);
        let id = Identity { step: self.step, micro: *micro, train, ..id("mlp", 0) };
        let pass = Pass {
            model: 0,
            step: self.step,
            micro: *micro,
            train,
            inference: false,
            signature: 1,
            among: (0, 1),
            reduces,
            groups: vec![Group {
                ranks: runs(&(0..WORLD).collect::<Vec<_>>()),
                begin: Some(self.clock),
                since: *since,
                together,
            }],
        };
        (*micro, *since) = (*micro + 1, *since + 1);
        if together {
            self.collective();
        }
        (pass, id)
    }
}

/// The lines of a job that did that, in the order in which ranks wrote them, and how many parts there are. The byte of a part
/// tells the pass.
fn lines(events: &[Event]) -> (Fixture, Vec<Vec<u8>>) {
    let (mut f, mut lines) = (Fixture::default(), Vec::new());
    let mut ranks: Vec<Counting> = (0..WORLD).map(|_| Counting::default()).collect();
    for (number, event) in events.iter().enumerate() {
        for (rank, counting) in (0..).zip(&mut ranks) {
            let (pass, id) = match *event {
                Event::Train(_) => counting.pass(true, true, false),
                Event::Evaluate(together) => counting.pass(false, false, together),
                Event::Alone(only, train, wrapped) if only == rank => counting.pass(train, train && wrapped, false),
                Event::Collective => {
                    counting.collective();
                    continue;
                }
                Event::Step => {
                    counting.stepped = true;
                    continue;
                }
                Event::Alone(..) => continue,
            };
            f.lines.clear();
            f.part(id, DType::UInt8, &[1], rank, dp(rank, WORLD, shard(0)), &[number as u8]);
            lines.push(f.lines.clone());
            lines.push(encode_line(&Line::Pass { job: JobId::default(), rank, pass }));
            if matches!(event, Event::Train(true)) {
                counting.collective();
            }
        }
    }
    (f, lines)
}

/// The passes that the parts of a record are of.
fn passes(run: &Run, record: &Record) -> Vec<u8> {
    record.parts.iter().map(|part| run.shards().part(part).unwrap()[0]).collect()
}

/// No whole is made of two passes, but where it is said that it might be.
fn expect_no_wrong_whole(run: &Run) {
    for record in &run.records {
        let assumed = record.parts.iter().any(|part| part.what.joined == Joined::Assumed);
        let of = passes(run, record);
        if record.shape().is_ok() && !assumed {
            assert!(of.iter().all(|pass| *pass == of[0]), "{} is of passes {of:?}", record.id);
        }
    }
}

proptest! {
    #[test]
    fn no_whole_is_made_of_two_passes_and_nothing_is_missing(
        events in proptest::collection::vec(event(), 1..40),
        cuts in proptest::collection::vec(any::<proptest::sample::Index>(), 0..4),
        seed in any::<u64>(),
    ) {
        let (f, mut all) = lines(&events);
        // Lines of different ranks come in any order.
        let mut random = seed;
        for at in (1..all.len()).rev() {
            random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            all.swap(at, (random >> 33) as usize % (at + 1));
        }
        let parts = all.len() / 2;
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(all.len().max(1))).collect();
        cuts.sort_unstable();
        let dir = f.kill();
        // Somebody writes in it.
        let lock = fs::File::create(dir.path().join(crate::format::LOCK_FILE)).unwrap();
        lock.lock().unwrap();
        let manifest = dir.path().join(MANIFEST_FILE);
        fs::write(&manifest, all[..cuts.first().copied().unwrap_or(0)].concat()).unwrap();
        let mut growing = Growing::open(dir.path()).unwrap();
        for cut in cuts {
            fs::write(&manifest, all[..cut].concat()).unwrap();
            growing.refresh().unwrap();
        }
        fs::write(&manifest, all.concat()).unwrap();
        growing.refresh().unwrap();
        drop(lock);
        let run = Run::open(dir.path()).unwrap();
        expect_no_wrong_whole(&run);
        prop_assert_eq!(run.records.iter().map(|record| record.parts.len()).sum::<usize>(), parts);
        prop_assert!(run.records.iter().all(|record| record.id.again == 0));
        // Where each rank did the same between two collectives, all that was reduced is whole.
        let alone = events.iter().any(|event| matches!(event, Event::Alone(_, true, true)));
        for (number, event) in events.iter().enumerate() {
            if matches!(event, Event::Train(_)) && !alone || matches!(event, Event::Evaluate(true)) {
                let whole = run.records.iter().find(|record| passes(&run, record).contains(&(number as u8)));
                let whole = whole.unwrap();
                prop_assert_eq!(passes(&run, whole), vec![number as u8; WORLD as usize], "{:?}", events);
                prop_assert!(whole.shape().is_ok() && whole.id.apart.is_none());
            }
        }
    }

    #[test]
    fn what_is_read_on_is_what_is_read_anew(
        events in proptest::collection::vec(event(), 1..30),
        cut in any::<proptest::sample::Index>(),
    ) {
        let (f, all) = lines(&events);
        let dir = f.kill();
        let manifest = dir.path().join(MANIFEST_FILE);
        let lock = fs::File::create(dir.path().join(crate::format::LOCK_FILE)).unwrap();
        lock.lock().unwrap();
        fs::write(&manifest, all[..cut.index(all.len().max(1))].concat()).unwrap();
        let mut growing = Growing::open(dir.path()).unwrap();
        expect_no_wrong_whole(&growing.run());
        fs::write(&manifest, all.concat()).unwrap();
        growing.refresh().unwrap();
        let anew = Run::open(dir.path()).unwrap();
        let told = |run: &Run| {
            let mut all: Vec<_> = run.records.iter().map(|r| (r.id.clone(), r.parts.clone())).collect();
            all.sort_by_key(|(id, _)| id.clone());
            all
        };
        prop_assert_eq!(told(&growing.run()), told(&anew));
        expect_no_wrong_whole(&anew);
    }
}

#[test]
fn a_pass_of_one_rank_is_whole_and_apart() {
    let (f, all) = lines(&[Event::Alone(1, false, false), Event::Train(true), Event::Step, Event::Train(true)]);
    let dir = f.kill();
    fs::write(dir.path().join(MANIFEST_FILE), all.concat()).unwrap();
    let run = Run::open(dir.path()).unwrap();
    let mut told: Vec<_> =
        run.records.iter().map(|r| (r.id.step, r.id.train, r.id.apart, r.shape().unwrap())).collect();
    told.sort();
    assert_eq!(told, [(0, false, Some(1), vec![1]), (0, true, None, vec![3]), (1, true, None, vec![3])]);
}

#[test]
fn what_is_not_known_yet_is_pending() {
    let (f, all) = lines(&[Event::Train(true), Event::Step, Event::Train(true)]);
    let dir = f.kill();
    let lock = fs::File::create(dir.path().join(crate::format::LOCK_FILE)).unwrap();
    lock.lock().unwrap();
    fs::write(dir.path().join(MANIFEST_FILE), all.concat()).unwrap();
    let mut growing = Growing::open(dir.path()).unwrap();
    let shapes = |run: &Run| run.records.iter().map(|r| r.shape().map_err(|e| e.to_string())).collect::<Vec<_>>();
    let [first, second] = shapes(&growing.run()).try_into().unwrap();
    assert_eq!(first, Ok(vec![3]));
    assert!(second.unwrap_err().starts_with("pending: "));
    drop(lock);
    fs::write(dir.path().join(crate::format::RUN_FILE), r#"{"format":3,"finished_ns":2,"world":3}"#).unwrap();
    growing.refresh().unwrap();
    assert_eq!(shapes(&growing.run()), [Ok(vec![3]), Ok(vec![3])]);
}

/// Along an axis without a clock, as between models that each two of four ranks wrap for themselves.
#[test]
fn passes_that_no_clock_tells_apart_are_assumed_to_be_one_also_where_gradients_are_reduced() {
    for begin in [None, Some(3)] {
        let mut passes = Passes::default();
        for (rank, step) in [(0, 0), (1, 0), (0, 1), (1, 1)] {
            let begin = begin.map(|begin| begin + step);
            let groups = vec![Group { ranks: runs(&[0, 1]), begin, since: 0, together: false }];
            passes.add(
                JobId::default(),
                rank,
                &Pass {
                    model: 0,
                    step,
                    micro: 0,
                    train: true,
                    inference: false,
                    signature: 1,
                    among: (0, 1),
                    reduces: true,
                    groups,
                },
            );
        }
        passes.decide(false);
        let first = Local { job: JobId::default(), rank: 1, model: 0, step: 0, micro: 0, train: true };
        let Verdict::Joint(joint) = passes.verdict(first) else { panic!("{:?}", passes.verdict(first)) };
        assert_eq!((joint.by_all, joint.assumed), (true, begin.is_none()));
    }
}
