//! The job's own store, the key-value store of its process group: what ranks on several nodes decide in.
//!
//! Only ranks reach it. An agent asks one of its ranks to do something there ([`StoreOp`]), and tells its ranks under which
//! key a proposal is decided upon ([`Place`]). What it puts there is its own affair: a rank compares bytes, and knows no key of
//! any agent's.

use serde::{Deserialize, Serialize};

use crate::revision::MAX_PLAN;

/// Most bytes of a value.
pub const MAX_VALUE: usize = MAX_PLAN + (8 << 10);
/// Most bytes of a key.
pub const MAX_KEY: usize = 256;
/// The value of a register whose proposal never begins. Everybody may write it.
pub const ABANDONED: &[u8] = b"abandoned";

/// Where the register of a proposal is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Place {
    /// In shared memory, whose descriptor rides on the message's first byte.
    Shared,
    /// In the job's store. Without a value it is open.
    Store {
        /// Its key.
        key: String,
        /// The value that means commit; any other means abandoned.
        commit: Vec<u8>,
    },
}

/// What an agent has a rank do in the job's store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum StoreOp {
    /// Gives a key this value if it has none. The answer is the value that it then has.
    Settle {
        /// The key.
        key: String,
        /// Its value, unless there is one.
        value: Vec<u8>,
    },
    /// Waits until a key has a value. The answer is that, or nothing when the time is over.
    WaitFor {
        /// The key.
        key: String,
        /// How long, in milliseconds; 0: one look.
        limit_ms: u32,
    },
}

impl StoreOp {
    /// Whether it is no longer than what is done in a store.
    pub fn is_short(&self) -> bool {
        match self {
            Self::Settle { key, value } => key.len() <= MAX_KEY && value.len() <= MAX_VALUE,
            Self::WaitFor { key, .. } => key.len() <= MAX_KEY,
        }
    }
}
