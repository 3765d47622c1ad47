//! `libflexmodel_engine.so`: what taps decide and do, in the processes of a job that load torch. `libflexmodel.so`
//! (`interposer/preload`) is in all of them, and loads this from beside itself.
//!
//! | file | does |
//! |---|---|
//! | [`start`](mod@start) | the one exported function: the preload calls it when torch is about to be loaded |
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
//! - `flexmodel_engine_start`
//!
//! # Invariants
//!
//! - **FORK-1** In a forked child taps are off for good; the child only flips atomics.
//! - **OPEN-1** An inner error or panic turns taps off in this process with one line; the job goes on.
//! - **WAIT-1** No wait is unbounded: see [`shipping`].

#![cfg_attr(test, allow(clippy::unwrap_used, clippy::indexing_slicing))]

mod boot;
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
