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
pub mod switch;
pub mod taps;
pub mod transport;
mod view;

#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

use std::{
    ffi::c_void,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use wire::{
    codes::Refusal,
    tap_abi::{BridgeTable, Call, Leaf, Trigger},
};

use answers::Answers;
use engine::{Engine, slice::without_crc};
use gather::{Communicator, Gather};
use plan::{HookPlan, PlanInForce};
use process::Process;
use transport::{Captured, Cutting, Settings, Transport};
use view::View;

/// Everything that taps use.
pub struct Capture {
    engine: Arc<Mutex<Engine>>,
    gather: Arc<Gather>,
    transport: Arc<Transport>,
    process: Arc<dyn Process>,
    bridge: &'static BridgeTable,
}

impl Capture {
    /// For the hooks of a job. Nothing is made or connected before the first tap needs it.
    pub fn new(plan: HookPlan, settings: Settings, process: Arc<dyn Process>, bridge: &'static BridgeTable) -> Self {
        // Where some ranks alone capture, the one that would send a replica may not be among them.
        let replicas_once = plan.is_for_all_ranks();
        let plans = Arc::new(PlanInForce::new(plan));
        let transport = Transport::new(settings, Answers::new(plans.clone()), replicas_once, process.clone(), bridge);
        let engine = Arc::new(Mutex::new(Engine::new(plans, process.clone(), transport.clone())));
        let clock = engine.clone();
        let step = move || clock.lock().unwrap_or_else(PoisonError::into_inner).last_step();
        let gather = Gather::new(transport.clone(), process.clone(), bridge, step);
        Self { engine, gather, transport, process, bridge }
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
        let has_parameters = self.engine().pass(serial, part, enter, trigger);
        if enter {
            self.transport.look();
        }
        has_parameters
    }

    /// An optimizer stepped: [`Engine::stepped`].
    pub fn stepped(&self, optimizer: u32) {
        self.engine().stepped(optimizer);
        self.transport.look();
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
    pub fn communicator(&self, comm: *mut c_void, index: usize, devices: bool) -> Communicator {
        Communicator::new(comm, index, devices, self.bridge)
    }

    /// What is gathered with the other ranks.
    pub fn gather(&self) -> &Arc<Gather> {
        &self.gather
    }

    /// The process ends in good order: finishes what is under way, within bounds.
    pub fn finish(&self) {
        self.engine().finish();
        self.gather.finish();
        self.transport.finish();
    }
}
