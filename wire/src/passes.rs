//! What a rank says of a forward pass of a model, so that passes of several ranks are known to be one.
//!
//! Each rank counts steps and passes by itself. Where ranks do not do the same (rank 0 evaluates alone), equal numbers do
//! not mean the same pass. What does is what they do together: a process group's members call its collectives in one order,
//! so that the number of these is a clock that all of them share. [`Group::begin`] is that clock when the pass began.

use serde::{Deserialize, Serialize};

/// Most groups of a pass: as many as a mesh has axes.
pub const MAX_GROUPS: usize = crate::record::MAX_AXES;
/// Most runs of ranks in a group.
pub const MAX_RUNS: usize = 4096;

/// A forward pass of a model on one rank.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pass {
    /// Number of the model on this rank.
    pub model: u32,
    /// Step, as in [`crate::record::RecordMeta`].
    pub step: u64,
    /// Forward pass of the model within the step, likewise.
    pub micro: u32,
    /// It trains.
    pub train: bool,
    /// It is one of inference: its step is a pass of the model.
    pub inference: bool,
    /// Equal where models are made of the same modules and are distributed in the same way.
    pub signature: u32,
    /// How many models of this signature the rank had before this one, and has in all.
    pub among: (u32, u32),
    /// It was made through a wrapper that reduces gradients in the backward pass, with gradients enabled.
    pub reduces: bool,
    /// The ranks over which the model is distributed, along each axis of its mesh.
    pub groups: Vec<Group>,
}

/// This rank and those that share its other coordinates, along one axis of a mesh.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Group {
    /// Global ranks.
    pub ranks: Vec<Run>,
    /// Collectives that all of them had called together when the pass began; `None` where that cannot be told.
    pub begin: Option<u64>,
    /// Passes of this kind that the rank had made since the last of these collectives.
    pub since: u32,
    /// More were called when it ended: all of the ranks made it.
    pub together: bool,
}

/// Ranks at equal distances.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Run {
    /// The first.
    pub first: u32,
    /// From each to the next.
    pub by: u32,
    /// How many.
    pub count: u32,
}

impl Run {
    /// The rank that would follow.
    fn after(self) -> Option<u32> {
        self.first.checked_add(self.by.checked_mul(self.count)?)
    }

    /// The ranks.
    pub fn ranks(self) -> impl Iterator<Item = u32> {
        (0..self.count).map(move |n| self.first.saturating_add(n.saturating_mul(self.by)))
    }
}

/// Ranks, in order, as few runs.
pub fn runs(ranks: &[u32]) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for &rank in ranks {
        match runs.last_mut() {
            Some(run) if run.count == 1 && rank > run.first => (run.by, run.count) = (rank - run.first, 2),
            Some(run) if run.count > 1 && run.after() == Some(rank) => run.count += 1,
            _ => runs.push(Run { first: rank, by: 1, count: 1 }),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_regular_mesh_is_one_run() {
        let run = |first, by, count| Run { first, by, count };
        assert_eq!(runs(&[0, 1, 2, 3]), [run(0, 1, 4)]);
        assert_eq!(runs(&[1, 3, 5]), [run(1, 2, 3)]);
        assert_eq!(runs(&[5]), [run(5, 1, 1)]);
        assert_eq!(runs(&[0, 1, 4, 5]), [run(0, 1, 2), run(4, 1, 2)]);
    }

    proptest! {
        #[test]
        fn runs_have_the_ranks_that_they_were_made_of(ranks in proptest::collection::vec(0u32..1000, 0..20)) {
            let again: Vec<u32> = runs(&ranks).into_iter().flat_map(Run::ranks).collect();
            prop_assert_eq!(again, ranks);
        }
    }
}
