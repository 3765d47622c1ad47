//! `libflexmodel.so`: preloaded into every process of a job, awake only in those that load torch.
//!
//! | file | does |
//! |---|---|
//! | [`start`] | reads the environment at load; decides between inert and armed |
//! | [`dlopen`] | the one interposed symbol: notices `torch/_C` and steps aside |
//! | [`python`] | the few functions of the Python C API we call, found by dlsym |
//! | [`boot`] | inside Python: finds the bridge for this torch, starts the shim |
//! | [`state`] | the one atomic state, forks, and the switch that turns taps off |
//! | [`host`] | the C table that taps call; the panic boundary |
//! | [`engine`] | decides: which modules, which step, capture or not |
//! | [`passes`] | steps, microbatches, calls and replays |
//! | [`layout`] | infers how a leaf lies over the ranks |
//! | [`gather`] | brings parts to one rank first, where hooks want that; agrees with the other ranks on it |
//! | [`shipping`] | slab and socket: carries bytes to the agent, or drops and counts them |
//! | [`log`] | lines on stderr, and only where the job's stderr still is |
//!
//! # Exported symbols
//!
//! The whole list; a test compares it with `nm -D`:
//!
//! - `dlopen`
//!
//! # Invariants
//!
//! - **INERT-1** Without `FLEXMODEL_HOOKS`, or with `FLEXMODEL_DISABLE=1`, nothing but `dlopen`'s jump remains.
//! - **FORK-1** In a forked child taps are off for good; the child only flips atomics.
//! - **OPEN-1** An inner error or panic turns taps off in this process with one line; the job goes on.
//! - **WAIT-1** No wait is unbounded: see [`shipping`].

#![cfg_attr(test, allow(clippy::unwrap_used, clippy::indexing_slicing))]

mod boot;
mod dlopen;
mod engine;
mod gather;
mod host;
mod layout;
mod log;
mod passes;
mod python;
mod shipping;
mod start;
mod state;
