//! Which of a slab's tensors have a line in the manifest, so that each gets one, whatever became of the agent that read it.

use std::{
    collections::{BTreeMap, HashMap},
    fs::File,
    io::{self, BufReader},
    path::Path,
};

use crate::{
    format::{Line, MANIFEST_FILE, Origin},
    manifest::Reader,
};

/// Reason of the losses that a rank counted itself.
pub const LOST_BY_JOB: &str = "the slab was full or the agent was away";
/// Reason of the losses of which nobody knows more than that they were begun.
pub const CUT_OFF: &str = "the job or the agent ended in the middle of it";

/// Reason of what was captured and no agent ever read.
pub const NEVER_READ: &str = "no agent read it";

/// Tensors of each rank.
pub type ByRank = BTreeMap<u32, u64>;

/// How many tensors of each rank the manifest of a run knows of: stored, refused or lost.
///
/// # Errors
/// The manifest cannot be read. One that is not there has none.
pub fn known(run: &Path) -> io::Result<ByRank> {
    let mut known = ByRank::new();
    let file = match File::open(run.join(MANIFEST_FILE)) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(known),
        other => other?,
    };
    let mut lines = Reader::new(BufReader::new(file));
    while let Some(entry) = lines.next_line()? {
        let (rank, count) = match entry.line {
            Ok(Line::Part(part)) => (part.what.rank, 1),
            Ok(Line::Refused { what, .. }) => (what.rank, 1),
            Ok(Line::Dropped { rank, count, .. }) => (rank, count),
            _ => continue,
        };
        let sum = known.entry(rank).or_default();
        *sum = sum.saturating_add(count);
    }
    Ok(known)
}

/// Of what ranks have `captured`, what a run does not know of that knew of some `before` and of more `now`. Where ranks
/// send each other's tensors a loss may be counted for another rank than it was captured on; the sum is right.
pub fn unknown(captured: &ByRank, before: &ByRank, now: &ByRank) -> ByRank {
    let of = |map: &ByRank, rank: &u32| map.get(rank).copied().unwrap_or(0);
    let sum = |map: &ByRank| map.values().fold(0u64, |sum, n| sum.saturating_add(*n));
    let mut left = sum(captured).saturating_sub(sum(now).saturating_sub(sum(before)));
    let mut out = ByRank::new();
    for (rank, count) in captured {
        let missing = count.saturating_sub(of(now, rank).saturating_sub(of(before, rank))).min(left);
        if missing > 0 {
            out.insert(*rank, missing);
            left -= missing;
        }
    }
    out
}

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
            Line::Divergence { .. }
            | Line::Job(_)
            | Line::Left { .. }
            | Line::Pass { .. }
            | Line::Revision(_)
            | Line::Sealed { .. } => {}
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

#[cfg(test)]
mod tests {
    use super::*;

    fn ranks<const N: usize>(counts: [(u32, u64); N]) -> ByRank {
        counts.into()
    }

    #[test]
    fn what_a_run_does_not_know_of_is_what_was_captured_less_what_came_since() {
        let captured = ranks([(0, 10), (1, 20)]);
        assert_eq!(unknown(&captured, &ranks([]), &ranks([])), captured);
        assert_eq!(unknown(&captured, &ranks([]), &ranks([(0, 10), (1, 18)])), ranks([(1, 2)]));
        assert_eq!(unknown(&captured, &ranks([(0, 7), (3, 4)]), &ranks([(0, 12), (1, 20), (3, 4)])), ranks([(0, 5)]));
    }

    /// Rank 0 sent some of rank 1's tensors, and lost one of its own.
    #[test]
    fn tensors_that_another_rank_sent_are_not_lost() {
        let captured = ranks([(0, 10), (1, 10)]);
        assert_eq!(unknown(&captured, &ranks([]), &ranks([(0, 13), (1, 6)])), ranks([(1, 1)]));
        assert_eq!(unknown(&captured, &ranks([]), &ranks([(0, 14), (1, 6)])), ranks([]));
        assert_eq!(unknown(&captured, &ranks([]), &ranks([(0, 30)])), ranks([]), "more than there can be");
    }
}
