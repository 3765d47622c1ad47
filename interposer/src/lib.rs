//! `libflexmodel_engine.so`: loads the capture engine ([`capture`]) in the processes of a job that load torch.
//! `libflexmodel.so` (`interposer/preload`) is in all of them, and loads this from beside itself.
//!
//! | file | does |
//! |---|---|
//! | [`start`](mod@start) | the one exported function: the preload calls it when torch is about to be loaded |
//! | [`python`] | the few functions of the Python C API we call, found by dlsym |
//! | [`settings`] | reads the environment |
//! | [`launch`] | which job this process is of, as far as its launcher says it |
//! | [`boot`] | inside Python: finds the bridge for this torch, makes the capture engine, starts the shim |
//! | [`instance`] | the one capture engine of this process |
//! | [`state`] | the one atomic state, forks, and the switch that turns taps off |
//! | [`host`] | the C table that taps call; the panic boundary |
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
//! - **WAIT-1** No wait is unbounded: see [`capture::transport`].

#![cfg_attr(test, allow(clippy::unwrap_used, clippy::indexing_slicing))]

mod boot;
mod host;
mod instance;
mod launch;
mod log;
mod python;
mod settings;
mod start;
mod state;
