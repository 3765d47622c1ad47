//! One tensor for the page: found, laid out, sampled within a bound, described.
//!
//! Where the parts of a record among the newest lie is remembered by [`Live`]; for an older one the run's manifest is gone
//! through line by line, and nothing of it is kept. How they make the whole is for the reader of runs to say, in a plan
//! ([`AssemblyPlan`]); what is read of it here is as many elements as the picture wants, where they lie ([`Source`]). No
//! checksum of a tensor is compared (that would read every byte); `flexmodel verify` does that.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    path::{Path, PathBuf},
};

use flexmodel_run::{
    Record,
    format::{Identity, Line, MANIFEST_FILE, Part},
    joining::{Joining, Told},
    manifest,
    read::{
        AssemblyPlan, Shards,
        rows::{self, Pad},
    },
    text,
};
use serde::Serialize;
use wire::record::{Axis, MICRO};

use super::{
    picture::{self, Picture},
    source::Source,
    windows::Windows,
};
use crate::live::Live;

/// The tensors of a run directory.
pub struct Tensors {
    run_dir: PathBuf,
    shards: Shards,
}

/// What the page shows of a tensor.
#[derive(Serialize)]
pub struct Look {
    #[serde(flatten)]
    id: Identity,
    name: String,
    class: String,
    dtype: &'static str,
    shape: Vec<u64>,
    /// One line for each mesh axis.
    layout: Vec<String>,
    dp_size: u32,
    bytes: u64,
    time_ms: f64,
    /// Of the hooks, where they changed while the job ran.
    #[serde(skip_serializing_if = "Option::is_none")]
    revision: Option<u64>,
    /// The parts that are there, whether they were wanted or not.
    parts: Vec<PartLook>,
    /// The rank whose part alone is shown.
    rank: Option<u32>,
    #[serde(flatten)]
    picture: Picture,
}

#[derive(Serialize)]
struct PartLook {
    rank: u32,
    shape: Vec<u64>,
    coordinates: Vec<(String, u32)>,
}

impl Tensors {
    pub fn new(run_dir: PathBuf) -> Self {
        Self { shards: Shards::new(&run_dir), run_dir }
    }

    /// Where they lie.
    pub fn run_dir(&self) -> &Path {
        &self.run_dir
    }

    /// Looks at a record as a whole, or at what one rank captured of it. The error is a whole sentence.
    pub fn look(&self, live: &Live, id: &Identity, rank: Option<u32>) -> Result<Look, String> {
        let (parts, only) = live
            .pick(id)
            .map_or_else(|| self.older(id, live.is_shown_again()), |picked| Ok((picked.parts, picked.only)))?;
        let whole = Record::new(parts, &live.partial(id), only.as_ref());
        let whole = whole.ok_or_else(|| format!("{id} was not captured, or not yet"))?;
        let own = rank.map(|rank| whole.of_rank(rank).ok_or_else(|| no_part(&whole))).transpose()?;
        let shown = own.as_ref().unwrap_or(&whole);
        let plan =
            AssemblyPlan::padded(&shown.parts, &Pad::default()).map_err(|e| self.shards.refusal(&e).to_string())?;
        let (shape, bytes) = (plan.shape(), plan.bytes());
        let source = Source::new(&plan.tree, plan.dtype, Windows::new(&self.shards, plan.sources.clone())?);
        let first = shown.what();
        let mut layout = layout_lines(&whole.what().axes);
        if rows::sizes(&plan.tree).is_some() {
            layout.push("rows that ranks padded to their own longest: filled up with 0 here".to_owned());
        }
        Ok(Look {
            id: id.clone(),
            name: id.to_string(),
            class: first.class.clone(),
            dtype: plan.dtype.name(),
            shape: shape.to_vec(),
            layout,
            dp_size: whole.data_size(),
            bytes,
            time_ms: first.time_ns as f64 / 1e6,
            revision: live.revision_of(&whole.parts),
            parts: whole.parts.iter().map(PartLook::of).collect(),
            rank,
            picture: picture::draw(shape, &|row, start, out| source.read(row, start, out), plan.stats)?,
        })
    }

    /// The parts of a record that is no longer among the newest, the first of each seat, and which ranks made its pass, where
    /// not all did; `over`: the run is. No more than these, a line of the manifest and what is known of passes is held.
    fn older(&self, id: &Identity, over: bool) -> Result<Found, String> {
        let path = self.run_dir.join(MANIFEST_FILE);
        scan(&path, id, over).or_else(|e| match e.kind() {
            io::ErrorKind::NotFound => Ok(Found::default()),
            _ => Err(format!("{}: {e}", path.display())),
        })
    }
}

/// Parts of a record, and the ranks that made its pass, where not all did.
type Found = (Vec<Part>, Option<BTreeSet<u32>>);

fn scan(path: &Path, id: &Identity, over: bool) -> io::Result<Found> {
    let mut lines = manifest::open(path)?;
    let (mut found, mut made_by, mut joining) = (BTreeMap::new(), None, Joining::default());
    let mut take = |told: Vec<Told>| {
        for one in told {
            if let Told::Part { part, only } = one
                && part.what.id == *id
            {
                made_by = only;
                found.entry(part.what.seat()).or_insert(*part);
            }
        }
    };
    while let Some(entry) = lines.next_line()? {
        // What does not read is no part; verify names it.
        match entry.line {
            Ok(Line::Part(part)) if part.what.id.module != id.module || part.what.id.path != id.path => {}
            Ok(line) => take(joining.line(line)),
            Err(_) => {}
        }
    }
    take(joining.end(over));
    Ok((found.into_values().collect(), made_by))
}

fn no_part(record: &Record) -> String {
    format!("no part from this rank; there are those of ranks {}", text::few(record.ranks()))
}

impl PartLook {
    fn of(part: &Part) -> Self {
        let coordinates = part.what.axes.iter().map(|a| (a.name.clone(), a.index)).collect();
        Self { rank: part.what.rank, shape: part.what.shape.clone(), coordinates }
    }
}

/// A line for each mesh axis, in words.
pub fn layout_lines(axes: &[Axis]) -> Vec<String> {
    let line = |axis: &Axis| {
        let members = match (axis.name == MICRO, axis.size) {
            (true, 1) => "microbatch",
            (true, _) => "microbatches",
            (false, 1) => "rank",
            (false, _) => "ranks",
        };
        format!("{}: {}, {} {members}", axis.name, axis.place, axis.size)
    };
    axes.iter().map(line).collect()
}

#[cfg(test)]
mod tests;
