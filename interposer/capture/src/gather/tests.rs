//! Two ranks that gather, in one process.

use wire::{
    codes::MoveState,
    counts::Counts,
    dtype::DType,
    env::OnFull,
    record::{Axis, Placement},
};

use super::*;
use crate::{
    testing::{BRIDGE, Member, StandInProcess, Tensor, hello},
    transport::Settings,
};

/// A bound for hangs.
const HANG: Duration = Duration::from_secs(30);

struct Rank {
    gather: Arc<Gather>,
    process: Arc<StandInProcess>,
    counts: Counts,
    member: Box<Member>,
}

impl Rank {
    fn new(index: usize, member: Box<Member>) -> Self {
        let (process, counts) = (StandInProcess::on(), Counts::create().unwrap());
        let settings = Settings {
            socket: String::new(),
            slab_bytes: 1 << 20,
            counts: Counts::open(&counts.name("agent"), "agent"),
            hello: hello(OnFull::Drop),
        };
        let transport = Transport::new(settings, process.clone(), &BRIDGE);
        let gather = Gather::new(transport, process.clone(), &BRIDGE, || 0);
        gather.joined(Communicator::new(member.handle(), index, -1, &BRIDGE), 2);
        Self { gather, process, counts, member }
    }

    /// Has a part of a tensor.
    fn take(&self, module: &str, index: u32) {
        let axes =
            vec![Axis { name: "dp".into(), index, size: 2, place: Placement::Shard { dim: 0 }, input_digest: None }];
        let tensor = Tensor::of(4);
        self.gather.take(Captured {
            meta: RecordMeta { axes, ..RecordMeta::output(module, DType::Float32, vec![4]) },
            handle: std::ptr::from_ref(&tensor).cast(),
            on_device: false,
            staged: false,
            collective: true,
            replicas_once: false,
            cut: None,
        });
    }

    /// Waits until its agent was given this number of parts.
    fn await_sent(&self, parts: u64) {
        let begin = Instant::now();
        while self.counts.by_rank().values().sum::<u64>() < parts {
            assert!(begin.elapsed() < HANG, "{:?}", self.counts.by_rank());
            thread::sleep(Duration::from_millis(1));
        }
    }
}

#[test]
fn where_a_rank_has_no_memory_parts_go_to_their_agents_and_the_ranks_go_on() {
    let mut members = Member::pair(MoveState::NotReady).into_iter();
    let ranks: [Rank; 2] = std::array::from_fn(|index| Rank::new(index, members.next().unwrap()));
    for (number, module) in ["a", "b"].into_iter().enumerate() {
        ranks.iter().zip(0..).for_each(|(rank, index)| rank.take(module, index));
        for rank in &ranks {
            rank.await_sent(number as u64 + 1);
            assert_eq!(rank.member.transfers.load(Ordering::Relaxed), number as u32 + 1, "nobody has left");
        }
    }
    thread::scope(|scope| ranks.iter().for_each(|rank| drop(scope.spawn(|| rank.gather.finish()))));
    for rank in &ranks {
        let lines = rank.process.lines.lock().unwrap();
        assert!(!lines.iter().any(|line| line.contains("assemble=collective")), "{lines:?}");
        assert_eq!(rank.counts.by_rank().values().sum::<u64>(), 2, "each part once");
    }
}
