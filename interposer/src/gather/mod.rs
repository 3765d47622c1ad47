//! `assemble=collective`: parts of a tensor are brought to one rank over a communicator of our own, and from there to its
//! agent, as one tensor's parts.
//!
//! A tap keeps a copy of its tensor and goes on: nothing here ever makes the job wait. One thread of each rank meets the
//! other ranks' in rounds, in which they tell each other what they keep ([`agreement`]), and transfers begin only of what
//! all members have. So ranks may come in any order, skip modules, stop or die.
//!
//! | what happens | what becomes of tensors |
//! |---|---|
//! | a rank skips a module, or describes another layout | named in the run; the others' parts go to their own agents |
//! | a rank does not take part in its step for [`STALE`] | the same |
//! | there is no communicator: other hooks on a rank, no process group | told once; every part goes to its own agent |
//! | more is kept than a slab holds | what is more goes to its own agent |
//! | a rank ends, dies or stands still, a transfer fails | within the communicator's bound, as without a communicator |
//! | the process ends | the others are waited for at most [`PATIENCE`] |

mod agreement;
mod kept;
mod meeting;
mod message;

use std::{
    collections::VecDeque,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use wire::record::RecordMeta;

use crate::{
    shipping::{self, Cargo},
    state,
};
pub use kept::Communicator;
use kept::Kept;
use meeting::Meeting;

/// How long a part is kept for the other ranks' parts.
const STALE: Duration = Duration::from_secs(30);
/// How long a rank that ends waits for the others.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long it waits for its thread, which may be in a transfer.
const FAREWELL: Duration = Duration::from_secs(10);

static GATHER: Mutex<Gather> = Mutex::new(Gather {
    way: Way::Awaited,
    queue: VecDeque::new(),
    bytes: 0,
    closing: None,
    stop: false,
    crowded: false,
    comm: None,
    meeting: false,
});
static NEWS: Condvar = Condvar::new();

/// Where parts go.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    /// They are kept until it is known whether there is a communicator.
    Awaited,
    /// To the thread that meets the other ranks.
    Together,
    /// To this rank's agent.
    Apart,
}

struct Gather {
    way: Way,
    /// What the thread has not seen yet, in order.
    queue: VecDeque<Outgoing>,
    /// Bytes kept, here and by the thread.
    bytes: u64,
    /// Since when the process ends.
    closing: Option<Instant>,
    /// The thread takes part in no further round.
    stop: bool,
    /// It was told that more came than can be kept.
    crowded: bool,
    /// While it may be cut.
    comm: Option<Communicator>,
    /// The thread is there: until it has left the communicator, the process must not end.
    meeting: bool,
}

struct Outgoing {
    meta: RecordMeta,
    /// `None`: its agent has it.
    kept: Option<Kept>,
    since: Instant,
}

impl Outgoing {
    fn ship(self) {
        if let Some(kept) = self.kept {
            shipping::ship(kept.cargo(self.meta));
        }
    }
}

fn lock() -> MutexGuard<'static, Gather> {
    GATHER.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Gives back what was kept.
fn forget(bytes: u64) {
    let mut gather = lock();
    gather.bytes = gather.bytes.saturating_sub(bytes);
}

/// Takes a part to the other ranks' parts; where that cannot be, to this rank's agent.
pub fn take(cargo: Cargo) {
    if agreement::members(&cargo.meta) <= 1 || !cargo.meta.refused.is_empty() || lock().way == Way::Apart {
        return shipping::ship(cargo);
    }
    let kept = Kept::new(&cargo);
    let since = Instant::now();
    let meta = cargo.meta.clone();
    let crowded = kept.is_none();
    if crowded {
        shipping::ship(cargo);
    }
    let mut gather = lock();
    let outgoing = Outgoing { meta, kept, since };
    if gather.way == Way::Apart {
        drop(gather);
        return outgoing.ship();
    }
    gather.queue.push_back(outgoing);
    let tell = crowded && !std::mem::replace(&mut gather.crowded, true);
    drop(gather);
    NEWS.notify_all();
    if tell {
        shipping::notice(
            "assemble=collective: tensors come faster than they can be gathered; the agents assemble some of them"
                .into(),
        );
    }
}

/// The ranks have a communicator.
pub fn joined(comm: Communicator, size: usize) {
    let mut gather = lock();
    if gather.meeting || gather.closing.is_some() || gather.way == Way::Apart {
        drop(gather);
        return comm.leave();
    }
    (gather.way, gather.comm, gather.meeting) = (Way::Together, Some(comm), true);
    drop(gather);
    let meet = move || {
        if catch_unwind(AssertUnwindSafe(|| Meeting::new(comm, size).run())).is_err() {
            state::off("a panic while tensors were gathered");
        }
        // First: who cuts it does so under the lock.
        lock().comm = None;
        comm.leave();
        lock().meeting = false;
        NEWS.notify_all();
    };
    if thread::Builder::new().name("flexmodel-gather".into()).spawn(meet).is_err() {
        let mut gather = lock();
        (gather.comm, gather.meeting) = (None, false);
        drop(gather);
        comm.leave();
        apart("no thread could be made");
    }
}

/// There is no communicator, for the reason given, if there is one to tell: everything goes to the agents.
pub fn apart(why: &str) {
    let mut gather = lock();
    gather.stop = true;
    let known = std::mem::replace(&mut gather.way, Way::Apart) == Way::Apart;
    let left = if !gather.meeting { std::mem::take(&mut gather.queue) } else { VecDeque::new() };
    drop(gather);
    left.into_iter().for_each(Outgoing::ship);
    if !known && !why.is_empty() {
        shipping::notice(format!("assemble=collective: {why}; from now on the agents assemble"));
    }
}

/// The process ends: waits, within a bound, until all that is kept went its way.
pub fn finish() {
    let mut gather = lock();
    gather.closing = Some(Instant::now());
    NEWS.notify_all();
    let (mut gather, late) =
        NEWS.wait_timeout_while(gather, FAREWELL, |gather| gather.meeting).unwrap_or_else(PoisonError::into_inner);
    if late.timed_out()
        && let Some(comm) = gather.comm
    {
        comm.cut();
        gather = NEWS
            .wait_timeout_while(gather, PATIENCE, |gather| gather.meeting)
            .unwrap_or_else(PoisonError::into_inner)
            .0;
    }
    gather.way = Way::Apart;
    let left = std::mem::take(&mut gather.queue);
    drop(gather);
    left.into_iter().for_each(Outgoing::ship);
}
