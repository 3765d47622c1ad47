//! The capture engine: what taps decide and do, in a process of the job. It has no globals and knows no torch: what is
//! one a process is handed in ([`process::Process`]), and tensors are the bridge's ([`wire::tap_abi::BridgeTable`]).
//!
//! | module | does |
//! |---|---|
//! | [`plan`] | the hooks: a plan with a revision, replaced as a whole |
//! | [`taps`] | which taps there are: module, kinds, clauses, plan |
//! | [`clock`] | counts steps, microbatches, passes, calls and replays |
//! | [`engine`] | decides: which modules, which step, capture or not; describes records |
//! | [`layout`] | infers how a leaf lies over the ranks |
//! | [`gather`] | brings parts to one rank first, where hooks want that; agrees with the other ranks on it |
//! | [`view`] | what a slice takes of a tensor |
//! | [`transport`] | slab and socket: carries records to the agent, or drops and counts them |
//! | [`answers`] | what a rank answers its agent |
//! | [`store`] | the job's own store, where ranks of several nodes decide on other hooks |
//! | [`process`] | what the process gives and does |
//! | [`switch`] | whether taps are on, and the ways into off |
//!
//! # Invariants
//!
//! - **FORK-1** In a forked child taps are off for good; the child only flips atomics.
//! - **WAIT-1** No wait is unbounded: see [`transport`].

#![cfg_attr(test, allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic))]

pub mod answers;
pub mod clock;
pub mod engine;
pub mod gather;
pub mod layout;
pub mod plan;
pub mod process;
pub mod store;
pub mod switch;
pub mod taps;
mod threads;
pub mod transport;
mod view;

#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

use std::{
    ffi::c_void,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use wire::{
    codes::Refusal,
    tap_abi::{BridgeTable, Call, Leaf, Rank, Trigger},
};

use answers::Answers;
use engine::{Engine, Reports, slice::without_crc};
use gather::{Communicator, Gather};
use plan::{HookPlan, PlanInForce};
use process::Process;
use store::JobStore;
use transport::{Captured, Cutting, Settings, Transport};
use view::View;

/// Everything that taps use.
pub struct Capture {
    engine: Arc<Mutex<Engine>>,
    gather: Arc<Gather>,
    transport: Arc<Transport>,
    store: Arc<JobStore>,
    process: Arc<dyn Process>,
    bridge: &'static BridgeTable,
    /// It has looked for an agent.
    attached: AtomicBool,
    /// The ranks of the job were started again.
    again: bool,
}

/// How long a rank that was started again waits for its agent.
const WELCOME: Duration = Duration::from_secs(1);

impl Capture {
    /// For the hooks of a job. Nothing is made or connected before the first tap needs it.
    pub fn new(plan: HookPlan, settings: Settings, process: Arc<dyn Process>, bridge: &'static BridgeTable) -> Self {
        let again = settings.hello.job.restarts.is_some_and(|restarts| restarts > 0);
        let plans = Arc::new(PlanInForce::new(plan));
        let transport = Transport::new(settings, process.clone(), bridge);
        let engine = Arc::new(Mutex::new(Engine::new(plans, process.clone(), transport.clone())));
        let store = Arc::new(JobStore::new(bridge));
        transport.answer_with(Answers::new(Arc::downgrade(&engine), store.clone()));
        let clock = engine.clone();
        let step = move || clock.lock().unwrap_or_else(PoisonError::into_inner).last_step();
        let gather = Gather::new(transport.clone(), process.clone(), bridge, step);
        Self { engine, gather, transport, store, process, bridge, attached: AtomicBool::new(false), again }
    }

    /// This, while taps are on: nothing may be asked of it after (FORK-1, OPEN-1).
    pub fn if_on(&self) -> Option<&Self> {
        self.process.is_on().then_some(self)
    }

    /// The engine, for as long as it is held.
    pub fn engine(&self) -> MutexGuard<'_, Engine> {
        self.engine.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The forward of a model or of a part of it begins or ends: [`Engine::pass`].
    pub fn pass(&self, serial: u64, part: u64, enter: bool, trigger: &Trigger) -> bool {
        self.engine().pass(serial, part, enter, trigger)
    }

    /// An optimizer stepped: [`Engine::stepped`].
    pub fn stepped(&self, optimizer: u32) {
        self.engine().stepped(optimizer);
    }

    /// Whether the next pass may be one that another plan begins with.
    pub fn is_due(&self) -> bool {
        self.engine().is_due()
    }

    /// A pass may be about to begin, in a process that is this rank: [`Engine::turn`].
    pub fn turn(&self, rank: Rank) -> bool {
        self.attach(rank);
        let mut engine = self.engine();
        let gathers = |engine: &Engine| !engine.plan().agreed_by_ranks().is_empty();
        let before = gathers(&engine);
        let turned = engine.turn();
        let now = gathers(&engine);
        drop(engine);
        match (before, now) {
            (false, true) => self.gather.begin_again(),
            (true, false) => self.gather.end(),
            _ => {}
        }
        turned
    }

    /// Attaches, once. A rank that was started again may belong to a job that has changed its hooks: it waits for its agent to
    /// say so, and without an agent it captures nothing.
    fn attach(&self, rank: Rank) {
        if self.attached.swap(true, Ordering::AcqRel) {
            return;
        }
        self.transport.describe(rank, "");
        if self.again && !self.transport.is_taken_in(WELCOME) {
            let text = "no agent says which hooks are in force in this job, whose ranks were started again: nothing is captured";
            self.transport.notice(format!("rank {}: {text}", rank.rank));
            self.engine().replace_plan(HookPlan::none());
        }
    }

    /// Captures a leaf, if anybody asked for it.
    ///
    /// # Safety
    /// What `leaf` points to lives through the call, and is as long as it says.
    pub unsafe fn capture(&self, call: &Call, leaf: &Leaf<'_>) {
        // SAFETY: the caller vouches for it.
        let captured = unsafe { self.engine().describe(call, leaf) };
        for mut captured in captured {
            match captured.cut.take() {
                None => self.carry(captured),
                // SAFETY: the caller vouches for the tensor.
                Some(cutting) => unsafe { self.cut(captured, &cutting) },
            }
        }
    }

    fn carry(&self, captured: Captured) {
        if captured.collective {
            self.gather.take(captured);
        } else {
            self.transport.send(captured);
        }
    }

    /// Captures a slice.
    ///
    /// # Safety
    /// As for [`Capture::capture`].
    unsafe fn cut(&self, mut captured: Captured, cutting: &Cutting) {
        if cutting.bytes_tell {
            let crc = self.transport.checksum(&captured);
            match &mut captured.meta.slice {
                Some(sliced) if crc.is_some() => sliced.crc = crc,
                _ => without_crc(&mut captured.meta.axes),
            }
        }
        // SAFETY: the caller vouches for the tensor.
        let view = unsafe { View::of(captured.handle, &cutting.cuts, self.bridge) };
        match &view {
            Some(view) => captured.handle = view.handle(),
            None => Refusal::Raised.reason().clone_into(&mut captured.meta.refused),
        }
        self.carry(captured);
    }

    /// The way of records to the agent.
    pub fn transport(&self) -> &Transport {
        &self.transport
    }

    /// A communicator of the bridge's making, as in [`wire::tap_abi::HostTable::joined`].
    pub fn communicator(&self, comm: *mut c_void, index: usize, device: i32) -> Communicator {
        Communicator::new(comm, index, device, self.bridge)
    }

    /// What is gathered with the other ranks.
    pub fn gather(&self) -> &Arc<Gather> {
        &self.gather
    }

    /// The store of the job's process group, as in [`wire::tap_abi::HostTable::store`].
    ///
    /// # Safety
    /// `store` is the bridge's making, or null.
    pub unsafe fn open_store(&self, store: *mut c_void, why: &str) {
        if store.is_null() {
            self.store.absent(why);
            return;
        }
        // SAFETY: the caller vouches for it.
        if let Err(why) = unsafe { self.store.open(store) } {
            self.transport.notice(why);
        }
    }

    /// The process ends in good order: finishes what is under way, within bounds.
    pub fn finish(&self) {
        self.store.finish();
        self.engine().finish();
        self.gather.finish();
        self.transport.finish();
    }
}
