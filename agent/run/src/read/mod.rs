//! Reads run directories: finished, live, killed or damaged ones.
//!
//! [`Run::open`] refuses only what is not a run at all. Damage inside becomes [`Problem`]s, and everything else is
//! served: a damaged manifest line costs its part, a damaged shard its bytes. A folder that holds the runs of a job's
//! nodes is a run too: see [`nodes`].

mod ask;
pub mod assemble;
pub mod fill;
mod folder;
mod gathered;
pub mod growing;
mod jobs;
pub mod layout;
pub mod nodes;
pub mod number;
mod plan;
mod problem;
mod records;
pub mod rows;
pub mod sealed;
mod select;
mod shards;
mod source;
pub mod tree;

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

pub use ask::{Wanted, shown};
pub use assemble::Whole;
pub use growing::Growing;
pub use layout::LayoutError;
pub use plan::{AssemblyPlan, PlanError};
pub use problem::{Found, Note, Problem, Said};
pub use records::{Each, Records};
pub use select::{Filter, display_module, in_order, natural, nearest};
pub use shards::{ReadError, Shards};
pub use source::Source;

use self::{gathered::Gathered, rows::Pad};
use crate::{
    format::{Identity, JobInfo, Part, Revision, RunInfo, Stats, What},
    limits::PROBLEMS,
    ownership::{PartialOwnership, lie_among},
    text,
};

/// One record: the parts that share an identity, one a rank; of a pipeline, one a rank and microbatch.
#[derive(Clone, Debug)]
pub struct Record {
    /// Which.
    pub id: Identity,
    /// In rank order; at least one.
    pub parts: Vec<Part>,
}

impl Record {
    /// The record of parts that came in this order; `None` of none. Where one was captured again, the first counts, and
    /// otherwise they are settled as those of [`Run::open`] are: those of a pass that some ranks alone made lie among these.
    pub fn new(mut parts: Vec<Part>, partial: &PartialOwnership, only: Option<&BTreeSet<u32>>) -> Option<Self> {
        let id = parts.first()?.what.id.clone();
        in_seats(&mut parts);
        layout::settle(&mut parts);
        match only {
            Some(only) => lie_among(&mut parts, only),
            None => partial.settle(&mut parts),
        }
        Some(Self { id, parts })
    }

    /// What one rank captured of it; `None` if nothing. Several parts of one rank, the microbatches of a pipeline, lie side
    /// by side.
    pub fn of_rank(&self, rank: u32) -> Option<Self> {
        let own: Vec<Part> = self.parts.iter().filter(|p| p.what.rank == rank).cloned().collect();
        (!own.is_empty()).then(|| Self { id: self.id.clone(), parts: layout::of_one_rank(own) })
    }

    /// The ranks that have parts of it.
    pub fn ranks(&self) -> BTreeSet<u32> {
        self.parts.iter().map(|part| part.what.rank).collect()
    }

    /// What the first part says.
    pub fn what(&self) -> &What {
        // A record is made with its first part.
        &self.parts[0].what
    }

    /// Revision of the hooks that it was captured under; the lowest, should parts differ.
    pub fn revision(&self) -> u64 {
        self.parts.iter().map(|part| part.what.revision).min().unwrap_or_default()
    }

    /// Shape of the whole, or why there is none.
    pub fn shape(&self) -> Result<Vec<u64>, LayoutError> {
        layout::plan(&self.parts).map(|node| node.shape().to_vec())
    }

    /// Shape of the whole once rows that ranks padded to their own longest are filled up; `None` where nothing is to be
    /// filled up, or there is no whole.
    pub fn padded_shape(&self) -> Option<Vec<u64>> {
        match self.shape() {
            Err(LayoutError::Ragged { high, .. }) => Some(high),
            _ => None,
        }
    }

    /// Statistics of the whole, as far as those of the parts tell them; without what would fill up rows.
    pub fn stats(&self) -> Option<Stats> {
        layout::padded(&self.parts, &Pad::default()).ok().and_then(|node| layout::stats(&node, &self.parts))
    }

    /// Over how many ranks the batch lies: a gradient of a mean loss is that many times one process's.
    pub fn data_size(&self) -> u32 {
        layout::data_size(&self.parts)
    }

    /// Whether only statistics were kept.
    pub fn stats_only(&self) -> bool {
        self.parts.iter().any(|p| p.at.is_none() && p.same.is_none())
    }

    /// Tensor bytes that its parts take in the store.
    pub fn stored_bytes(&self) -> u64 {
        let mut seen = HashSet::new();
        let mut places = self.parts.iter().filter_map(|p| p.at.as_ref());
        if let [Part { at: Some(only), .. }] = self.parts.as_slice() {
            return only.len;
        }
        text::total(places.by_ref().filter(|at| seen.insert((at.shard.as_str(), at.offset))).map(|at| at.len))
    }
}

/// What the manifest says was not captured.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Lost {
    /// Tensors refused, with the reason.
    pub refused: Vec<(What, String)>,
    /// Replicas that differ from the one of the rank beside them.
    pub divergences: Vec<(What, u32)>,
    /// Parts dropped: rank, count, reason.
    pub dropped: Vec<(u32, u64, String)>,
}

/// An open run directory.
pub struct Run {
    /// Where it is.
    pub path: PathBuf,
    /// Where it is several nodes' runs, their folders in `path`; empty for a run of one folder.
    pub nodes: Vec<String>,
    /// `run.json`; default where it is damaged.
    pub info: RunInfo,
    /// In the order of their first part in the manifest.
    pub records: Records,
    /// The jobs and their attempts, in order.
    pub jobs: Vec<JobInfo>,
    /// The revisions of their hooks that began while they ran, in order.
    pub revisions: Vec<Revision>,
    /// What is not there, and why.
    pub lost: Lost,
    /// Seals the manifest tells of: shard and length.
    pub sealed: Vec<(String, u64)>,
    /// Damage found while opening.
    pub problems: Vec<Problem>,
    /// Worth saying, not damage.
    pub notes: Vec<Note>,
    /// Bytes that each shard must have.
    ends: BTreeMap<String, u64>,
    source: Arc<Source>,
}

/// Why a path is no run.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Nothing there, or not a run.
    #[error("{path}: {reason}")]
    NotARun {
        /// As given.
        path: String,
        /// Why, and the way out.
        reason: String,
    },
    /// The system said no.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: String,
        /// Why.
        source: io::Error,
    },
}

impl Run {
    /// Opens a run directory, or a folder with the runs of one job's nodes.
    pub fn open(path: &Path) -> Result<Self, OpenError> {
        let mut gathered = Gathered::of(path)?;
        gathered.read_on()?;
        gathered.run()
    }

    /// Opens a run directory.
    pub fn open_one(path: &Path) -> Result<Self, OpenError> {
        let mut gathered = Gathered::of_one(path)?;
        gathered.read_on()?;
        gathered.run()
    }

    /// Whether its agent closed it.
    pub fn finished(&self) -> bool {
        self.info.finished_ns.is_some()
    }

    /// The shards' files.
    pub fn shards(&self) -> &Shards {
        self.source.shards()
    }

    /// The whole tensor of a record, checksums compared; one range of the mapped shard where it lies there in one piece.
    pub fn whole(&self, record: &Record) -> Result<Whole, ReadError> {
        self.carried_out(record, AssemblyPlan::new(&record.parts))
    }

    /// As [`Run::whole`], with rows that ranks padded to their own longest filled up by `pad`.
    pub fn padded(&self, record: &Record, pad: &Pad) -> Result<Whole, ReadError> {
        self.carried_out(record, AssemblyPlan::padded(&record.parts, pad))
    }

    fn carried_out(&self, record: &Record, plan: Result<AssemblyPlan, PlanError>) -> Result<Whole, ReadError> {
        let name = record.id.to_string();
        let plan = plan.map_err(|e| match e {
            PlanError::Layout(e) => self.layout_error(record, e),
            e => self.shards().refusal(&e).about(&name),
        })?;
        let bytes = assemble::assemble(&plan.tree, plan.dtype, &mut |i: usize| self.shards().part(&record.parts[i]))
            .map_err(|e: ReadError| e.about(&name))?;
        Ok(Whole { dtype: plan.dtype, shape: plan.shape().to_vec(), bytes })
    }

    /// What one rank captured of a record: where it has several parts, the microbatches of a pipeline, these laid side by
    /// side.
    pub fn part(&self, record: &Record, rank: u32) -> Result<Whole, ReadError> {
        match record.of_rank(rank) {
            Some(own) => self.whole(&own),
            None => Err(ReadError::Layout(format!(
                "{}: no part from rank {rank}; there is {}",
                record.id,
                text::few(record.ranks())
            ))),
        }
    }

    fn layout_error(&self, record: &Record, e: LayoutError) -> ReadError {
        match e {
            LayoutError::Missing(_) | LayoutError::Pending(_) => {
                ReadError::Incomplete(format!("{}: {}", record.id, self.explain(&e)))
            }
            _ => ReadError::Layout(format!("{}: {e}", record.id)),
        }
    }

    /// A layout error in words; missing parts by rank where other records tell which ranks these are.
    pub fn explain(&self, e: &LayoutError) -> String {
        let LayoutError::Missing(missing) = e else { return e.to_string() };
        let known: Option<Vec<String>> =
            missing.iter().map(|c| self.source.rank_at(c).map(|r| r.to_string())).collect();
        match known.as_deref() {
            Some([one]) => format!("{e} (rank {one})"),
            Some(many) => format!("{e} (ranks {})", many.join(", ")),
            None => e.to_string(),
        }
    }

    /// What its records have in common.
    pub fn source(&self) -> &Arc<Source> {
        &self.source
    }

    /// Shards that are missing, or shorter than the manifest needs.
    pub fn shard_problems(&self) -> Vec<String> {
        let mut found = self.ends.iter().filter_map(|(stem, &end)| self.shards().problem(stem, end));
        let mut problems: Vec<String> = found.by_ref().take(PROBLEMS).collect();
        if found.next().is_some() {
            problems.push("other shards were not looked at".to_owned());
        }
        problems
    }

    /// Modules that have records, in natural order.
    pub fn modules(&self) -> Vec<&str> {
        let unique: HashSet<&str> = self.records.iter().map(|r| r.id.module.as_str()).collect();
        let mut names: Vec<&str> = unique.into_iter().collect();
        names.sort_by_cached_key(|name| (natural(name), *name));
        names
    }
}

/// Puts parts in order of their seats. Of those with one seat the first that came stays, and the others are given back.
fn in_seats(parts: &mut Vec<Part>) -> Vec<Part> {
    if parts.is_sorted_by(|a, b| a.what.seat() < b.what.seat()) {
        return Vec::new();
    }
    // Stable: of one seat the first that came is the first.
    parts.sort_by_key(|part| part.what.seat());
    let (mut kept, mut again): (Vec<Part>, Vec<Part>) = (Vec::with_capacity(parts.len()), Vec::new());
    for part in parts.drain(..) {
        match kept.last().is_some_and(|last| last.what.seat() == part.what.seat()) {
            true => again.push(part),
            false => kept.push(part),
        }
    }
    *parts = kept;
    again
}

#[cfg(test)]
mod tests;
