//! Which of a slab's tensors have a line in the manifest, so that each gets one, whatever became of the agent that read it.

use std::collections::HashMap;

use super::format::{Line, Origin};

/// Reason of the losses that a rank counted itself.
pub const LOST_BY_JOB: &str = "the slab was full or the agent was away";
/// Reason of the losses of which nobody knows more than that they were begun.
pub const CUT_OFF: &str = "the job or the agent ended in the middle of it";

/// By the slab's number.
pub type Accounts = HashMap<u64, Account>;

/// What the manifest has of one slab.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Account {
    /// Tensors with a line of their own, and those that were cut off.
    pub settled: u64,
    /// Losses that the rank counted itself.
    pub by_job: u64,
    /// The tensor of the last line. Frames are released after their line, so that no other one can come again.
    pub last: u64,
    /// Up to this one all are in `settled` that had no line: what comes of them later comes too late.
    pub cut_off: u64,
}

impl Account {
    /// Counts a line of the manifest.
    pub fn note(accounts: &mut Accounts, line: &Line) {
        match line {
            Line::Part(part) => Self::settle(accounts, part.what.from, 1),
            Line::Refused { what, .. } => Self::settle(accounts, what.from, 1),
            Line::Dropped { count, reason, from: Some(Origin(slab, _)), .. } if reason == LOST_BY_JOB => {
                let account = accounts.entry(*slab).or_default();
                account.by_job = account.by_job.saturating_add(*count);
            }
            Line::Dropped { count, reason, from, .. } => {
                Self::settle(accounts, *from, *count);
                if let Some(Origin(slab, record)) = from
                    && reason == CUT_OFF
                {
                    accounts.entry(*slab).or_default().cut_off = *record;
                }
            }
            Line::Divergence { .. } | Line::Sealed { .. } => {}
        }
    }

    fn settle(accounts: &mut Accounts, from: Option<Origin>, count: u64) {
        if let Some(Origin(slab, record)) = from {
            let account = accounts.entry(slab).or_default();
            account.settled = account.settled.saturating_add(count);
            account.last = record;
        }
    }

    /// Whether a frame of this tensor has nothing to add.
    pub fn knows(&self, record: u64) -> bool {
        record == self.last || record <= self.cut_off
    }

    /// Of `begun` tensors, those that are neither settled nor counted by the rank itself.
    pub fn missing(&self, begun: u64) -> u64 {
        begun.saturating_sub(self.settled.saturating_add(self.by_job))
    }
}
