//! `assemble=collective`: parts of a tensor are brought to one rank over a communicator of our own, and from there to its
//! agent, as one tensor's parts.
//!
//! A tap stages a copy of its tensor and goes on: nothing here ever makes the job wait. One thread of each rank meets the
//! other ranks' in rounds, in which they tell each other what they have staged ([`agreement`]) and what of it has come on its
//! device ([`coming`]), and transfers begin only of what all members have. So ranks may come in any order, skip modules, stop
//! or die.
//!
//! | what happens | what becomes of tensors |
//! |---|---|
//! | a rank skips a module, or describes another layout | named in the run; the others' parts go to their own agents |
//! | a rank does not take part in its step for [`STALE`] | the same |
//! | there is no communicator: other hooks on a rank, no process group | said once; every part goes to its own agent |
//! | more is staged than a slab holds | what is more goes to its own agent |
//! | a rank has no memory for what it is to receive | these parts, and all that it would receive later, go to their own agents |
//! | a rank ends, dies or stands still, a transfer fails | within the communicator's bound, as without a communicator |
//! | the process ends | the others are waited for at most [`PATIENCE`] |

mod agreement;
mod coming;
mod communicator;
mod meeting;
mod message;
mod staging;
#[cfg(test)]
mod tests;

use std::{
    collections::VecDeque,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use wire::{record::RecordMeta, tap_abi::BridgeTable};

use crate::{
    process::Process,
    transport::{Captured, Transport},
};
pub use communicator::Communicator;
use meeting::Meeting;
use staging::Staged;

/// How long a part is staged for the other ranks' parts.
const STALE: Duration = Duration::from_secs(30);
/// How long a rank that ends waits for the others.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long it waits for its thread, which may be in a transfer.
const FAREWELL: Duration = Duration::from_secs(10);

/// Where parts go.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Route {
    /// They are staged until it is known whether there is a communicator.
    Pending,
    /// To the thread that meets the other ranks.
    Collective,
    /// To this rank's agent.
    PerRank,
}

struct State {
    route: Route,
    /// What the thread has not seen yet, in order.
    queue: VecDeque<Outgoing>,
    /// Since when the process ends.
    closing: Option<Instant>,
    /// The thread takes part in no further round.
    stop: bool,
    /// When it has ended, another communicator may come.
    again: bool,
    /// It was said that more came than can be staged.
    crowded: bool,
    /// While it may be cut.
    comm: Option<Communicator>,
    /// The thread is there: until it has left the communicator, the process must not end.
    meeting: bool,
}

struct Outgoing {
    meta: RecordMeta,
    /// `None`: its agent has it.
    staged: Option<Staged>,
    since: Instant,
}

/// What a rank gathers with the others.
pub struct Gather {
    state: Mutex<State>,
    /// Something has changed in the state.
    news: Condvar,
    /// Bytes staged, in the queue and by the thread.
    staged_bytes: Arc<AtomicU64>,
    /// As in [`Captured`], of all that came.
    replicas_once: AtomicBool,
    transport: Arc<Transport>,
    process: Arc<dyn Process>,
    bridge: &'static BridgeTable,
    /// The step that this rank is in.
    step: Box<dyn Fn() -> u64 + Send + Sync>,
}

impl Gather {
    /// Nothing is known of a communicator yet.
    pub fn new(
        transport: Arc<Transport>,
        process: Arc<dyn Process>,
        bridge: &'static BridgeTable,
        step: impl Fn() -> u64 + Send + Sync + 'static,
    ) -> Arc<Self> {
        let state = State {
            route: Route::Pending,
            queue: VecDeque::new(),
            closing: None,
            stop: false,
            again: false,
            crowded: false,
            comm: None,
            meeting: false,
        };
        let step = Box::new(step);
        let (state, news, staged_bytes) = (Mutex::new(state), Condvar::new(), Arc::default());
        let replicas_once = AtomicBool::new(true);
        Arc::new(Self { state, news, staged_bytes, replicas_once, transport, process, bridge, step })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn send_one(&self, outgoing: Outgoing) {
        if let Some(staged) = outgoing.staged {
            self.transport.send(staged.captured(outgoing.meta));
        }
    }

    fn send_all(&self, outgoing: impl IntoIterator<Item = Outgoing>) {
        outgoing.into_iter().for_each(|one| self.send_one(one));
    }

    /// Takes a part to the other ranks' parts; where that cannot be, to this rank's agent.
    pub fn take(&self, captured: Captured) {
        let meta = &captured.meta;
        if agreement::members(meta) <= 1 || !meta.refused.is_empty() || self.lock().route == Route::PerRank {
            return self.transport.send(captured);
        }
        if !captured.replicas_once {
            self.replicas_once.store(false, Ordering::Relaxed);
        }
        let staged = Staged::new(&captured, self.transport.slab_bytes(), self.bridge, &self.staged_bytes);
        let since = Instant::now();
        let meta = captured.meta.clone();
        let crowded = staged.is_none();
        if crowded {
            self.transport.send(captured);
        }
        let mut state = self.lock();
        let outgoing = Outgoing { meta, staged, since };
        if state.route == Route::PerRank {
            drop(state);
            return self.send_one(outgoing);
        }
        state.queue.push_back(outgoing);
        let say = crowded && !std::mem::replace(&mut state.crowded, true);
        drop(state);
        self.news.notify_all();
        if say {
            self.transport.notice(
                "assemble=collective: tensors come faster than they can be gathered; the agents assemble some of them"
                    .into(),
            );
        }
    }

    /// The ranks have a communicator.
    pub fn joined(self: &Arc<Self>, comm: Communicator, size: usize) {
        // One that is being left may be left for this one.
        let leaves = |state: &mut State| state.meeting && state.again;
        let waited = self.news.wait_timeout_while(self.lock(), PATIENCE, leaves);
        let mut state = waited.unwrap_or_else(PoisonError::into_inner).0;
        if state.meeting || state.closing.is_some() || state.route == Route::PerRank {
            drop(state);
            return comm.leave();
        }
        (state.route, state.comm, state.meeting) = (Route::Collective, Some(comm), true);
        drop(state);
        let gather = self.clone();
        let meet = move || {
            if catch_unwind(AssertUnwindSafe(|| Meeting::new(gather.clone(), comm, size).run())).is_err() {
                gather.process.off("a panic while tensors were gathered");
            }
            // First: who cuts it does so under the lock.
            gather.lock().comm = None;
            comm.leave();
            let mut state = gather.lock();
            state.meeting = false;
            if std::mem::take(&mut state.again) {
                (state.route, state.stop) = (Route::Pending, false);
            }
            drop(state);
            gather.news.notify_all();
        };
        if thread::Builder::new().name("flexmodel-gather".into()).spawn(meet).is_err() {
            let mut state = self.lock();
            (state.comm, state.meeting) = (None, false);
            drop(state);
            comm.leave();
            self.per_rank("no thread could be made");
        }
    }

    /// The plan in force wants tensors gathered, and the one before did not: there may be a communicator again.
    pub fn begin_again(&self) {
        let mut state = self.lock();
        if state.meeting {
            state.again = true;
        } else {
            (state.route, state.stop, state.crowded) = (Route::Pending, false, false);
        }
        self.replicas_once.store(true, Ordering::Relaxed);
    }

    /// The plan in force wants nothing gathered any more: the communicator is left, as soon as all ranks come to that.
    pub fn end(&self) {
        self.lock().again = false;
        self.per_rank("");
        self.news.notify_all();
    }

    /// There is no communicator, for the reason given, if there is one to say: everything goes to the agents.
    pub fn per_rank(&self, why: &str) {
        let mut state = self.lock();
        state.stop = true;
        let known = std::mem::replace(&mut state.route, Route::PerRank) == Route::PerRank;
        let left = if !state.meeting { std::mem::take(&mut state.queue) } else { VecDeque::new() };
        drop(state);
        self.send_all(left);
        if !known && !why.is_empty() {
            self.transport.notice(format!("assemble=collective: {why}; from now on the agents assemble"));
        }
    }

    /// The process ends: waits, within a bound, until all that is staged went its way.
    pub fn finish(&self) {
        let mut state = self.lock();
        state.closing = Some(Instant::now());
        self.news.notify_all();
        let (mut state, late) = self
            .news
            .wait_timeout_while(state, FAREWELL, |state| state.meeting)
            .unwrap_or_else(PoisonError::into_inner);
        if late.timed_out()
            && let Some(comm) = state.comm
        {
            comm.cut();
            state = self
                .news
                .wait_timeout_while(state, PATIENCE, |state| state.meeting)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        state.route = Route::PerRank;
        let left = std::mem::take(&mut state.queue);
        drop(state);
        self.send_all(left);
    }
}
