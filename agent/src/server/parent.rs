//! Words between `flexmodel run` and the agent it started: JSON lines over the agent's stdin and stdout.

use std::path::PathBuf;

use flexmodel_run::format::Totals;
use serde::{Deserialize, Serialize};

/// From `run` to its agent. The end of the stream means that `run` is gone.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToAgent {
    /// What was started.
    Job {
        /// As the user gave it.
        command: Vec<String>,
        /// As the user wrote them.
        hooks: String,
        /// Its process.
        pid: u32,
    },
    /// The command is over: empty the slabs, seal, say [`FromAgent::Done`] and exit.
    Finish {
        /// Its exit code.
        exit_code: Option<i32>,
    },
}

/// From the agent to `run`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FromAgent {
    /// Ranks may attach.
    Ready {
        /// The run directory.
        run: PathBuf,
        /// The dashboard's address with its token.
        dashboard: String,
    },
    /// It could not start: the line for the user.
    Failed(String),
    /// Counters so far.
    Progress(Totals),
    /// The command is over and the slabs are being emptied; said again and again until it is done.
    Finishing {
        /// Counters so far.
        totals: Totals,
        /// Bytes that were read from the slabs.
        read: u64,
        /// Shards that are not sealed yet.
        unsealed: usize,
    },
    /// The run directory is complete.
    Done {
        /// Final counters.
        totals: Totals,
    },
}
