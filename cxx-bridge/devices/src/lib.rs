//! What FlexModel does on devices and needs no torch for, over the CUDA driver and the NCCL that torch has loaded.
//!
//! torch's own events and streams are not used. Its events set the thread's device back by its number, which is 0 on a
//! thread that never chose one: that makes a context on device 0, of some 0.5 GB, for every rank of a node. Its streams are
//! 32, which the job gets too.
//!
//! # Invariants
//!
//! - **DEVICE-1** Whatever is done on a device is done with its context on the thread, and afterwards the thread has what
//!   it had before, be it none. No context is ever made.
//! - **DEVICE-2** What is done there is no part of a graph that the job captures, and breaks none: neither on another thread
//!   of the job's, nor on one of ours. A stream of which nobody can say that it is *not* captured is taken for captured.
//! - **DEVICE-3** Nothing of ours waits on a device for the job's streams: the host asks whether an event has come. A
//!   transfer between ranks thus lasts as long as its bytes do, whatever either job has queued.
//!
//! Without a GPU this is tested over stand-ins for the driver and for NCCL (`tests/cuda-standin`, `tests/nccl-standin`).

mod device;
mod driver;
mod event;
mod ranks;

pub use device::{Aside, Device, Stream};
pub use event::Event;
pub use ranks::{Ranks, Transfer};

/// Why something could not be done on a device. Displays as one line.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The process has not loaded the driver.
    #[error("this process has not loaded libcuda.so.1")]
    NoDriver,
    /// The driver is too old.
    #[error("the loaded libcuda.so.1 has no {0}: a driver for CUDA 10.1 or newer is needed")]
    Symbol(&'static str),
    /// The process has no context there, so no tensor either.
    #[error("the job does not use device {0}")]
    NotUsed(i32),
    /// A call returned an error.
    #[error("{call}: CUDA's error {code}")]
    Call {
        /// The driver's name of the function.
        call: &'static str,
        /// `CUresult`.
        code: i32,
    },
    /// A copy failed, and others before it could not be waited for: they may use their memory as long as the process lives.
    #[error("{0}; copies before it cannot be waited for")]
    Stuck(Box<Error>),
}
