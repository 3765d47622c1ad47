//! What went wrong, with the call, NCCL's own words and the way out.

use std::{fmt, time::Duration};

/// Why there is no communicator, or none any more. Displays as one line.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The process has not loaded the library.
    #[error(
        "this process has not loaded {name} ({reason}): only a CUDA build of torch brings it; assemble=agent needs none"
    )]
    NotLoaded {
        /// What was looked for.
        name: String,
        /// The dynamic linker's reason.
        reason: String,
    },
    /// The library is too old.
    #[error("the loaded {name} has no {symbol}: NCCL 2.14 or newer is needed; use a newer torch, or assemble=agent")]
    Symbol {
        /// The library.
        name: String,
        /// What it lacks.
        symbol: &'static str,
    },
    /// What the job's environment says would have our calls harm the job's.
    #[error("{setting}, {harm}: unset it, or use assemble=agent")]
    Environment {
        /// The variable, and what it is.
        setting: &'static str,
        /// What it does.
        harm: &'static str,
    },
    /// What was asked for makes no sense. Nothing was sent.
    #[error("{0}")]
    Argument(String),
    /// A call returned an error.
    #[error("{call}: {failure}")]
    Call {
        /// NCCL's name of the function.
        call: &'static str,
        /// What it said.
        failure: Failure,
    },
    /// The communicator failed after the call had returned.
    #[error("after {during}: {failure}")]
    Later {
        /// NCCL's name of the last function that was called before.
        during: &'static str,
        /// What was reported.
        failure: Failure,
    },
    /// A deadline passed.
    #[error(
        "{during} was not done after {:.1} s: another rank is late, gone, or did not make the same calls; {}",
        waited.as_secs_f64(), AGENT
    )]
    Deadline {
        /// NCCL's name of the function, or "the stream".
        during: &'static str,
        /// How long it was waited for.
        waited: Duration,
    },
    /// A call did not come back. Its thread is left behind with it, and may still touch the memory it was given.
    #[error("{during} did not return after {:.1} s: it is left behind; {AGENT}", waited.as_secs_f64())]
    Stuck {
        /// What was under way.
        during: &'static str,
        /// How long it was waited for.
        waited: Duration,
    },
    /// The caller's device or stream failed.
    #[error("the device: {0}; {AGENT}")]
    Device(String),
    /// No thread could be made, or it died.
    #[error("the communicator's thread: {0}; {AGENT}")]
    Thread(String),
    /// [`crate::Comm::abort`] was called.
    #[error("this communicator was aborted")]
    Aborted,
}

const AGENT: &str = "assemble=agent needs no collective";

/// What NCCL said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// `ncclResult_t`.
    pub code: i32,
    /// `ncclGetErrorString` of the code.
    pub text: String,
    /// `ncclGetLastError`: the last warning in this process, of whichever communicator. May be empty.
    pub last: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (code {}", self.text, self.code)?;
        if !self.last.is_empty() {
            write!(f, "; NCCL's last warning: {}", self.last.replace(char::is_control, " ").trim())?;
        }
        write!(f, "); {AGENT}")
    }
}
