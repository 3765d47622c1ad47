//! Records and runs for tests.

pub mod fixture;

use wire::{
    control::StepRule,
    dtype::DType,
    record::{Axis, Placement, RecordMeta},
    revision::Clause,
};

use crate::format::{JobId, Location, Part, Revision, Stats, What};

/// A float32 forward output of shape `[rows, 4]`, whole.
pub fn meta(module: &str, step: u64, rows: u64) -> RecordMeta {
    RecordMeta { class: "MLP".into(), step, time_ns: 7, ..RecordMeta::output(module, DType::Float32, vec![rows, 4]) }
}

/// [`meta`] as `rank` of `world` ranks captured it, laid along one data parallel axis as `place` says.
pub fn on_rank(mut meta: RecordMeta, rank: u32, world: u32, place: Placement) -> RecordMeta {
    meta.rank = rank;
    meta.dp_size = world;
    meta.axes = vec![Axis { name: "dp".into(), index: rank, size: world, place, input_digest: None }];
    meta
}

/// Consecutive pieces of the batch.
pub fn batch() -> Placement {
    Placement::Shard { dim: 0 }
}

/// A stored part.
pub fn part(module: &str, step: u64, rows: u64) -> Part {
    let what = What::from_meta(meta(module, step, rows));
    let at = Location { shard: "shard-00000".into(), offset: 1 << 20, len: rows * 16, crc: 5 };
    let stats = Stats { count: rows * 4, mean: Some(0.5), std: None, ..Stats::default() };
    Part { what, at: Some(at), stats: Some(stats), same: None }
}

/// A revision of a job of two ranks that begins with a step, of these clauses.
pub fn revision(job: JobId, revision: u64, step: u64, clauses: &[&str]) -> Revision {
    let clauses: Vec<Clause> = (1..).zip(clauses).map(|(id, &text)| Clause { id, text: text.to_owned() }).collect();
    let (begins, rule) = (Some(step), StepRule::Optimizer);
    let last_id = clauses.len() as u32;
    Revision { job, revision, begins, rule, ranks: 2, clauses, last_id, time_ns: 9 }
}
