//! One tensor for the page: found, laid out, sampled within a bound, described.
//!
//! A record among the newest is read by the places that [`Live`] remembers; for an older one the run's manifest is gone
//! through line by line, and nothing of it is kept. Its elements are read where they lie ([`Source`]), as many as the
//! picture wants. No checksum of a tensor is compared here (that would read every byte); `flexmodel verify` does that.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, BufReader},
    path::{Path, PathBuf},
};

use flexmodel_run::{
    format::{Identity, Line, Location, MANIFEST_FILE, Part},
    manifest::Reader,
    read::{
        Shards,
        layout::{self, Node},
    },
};
use serde::Serialize;
use wire::record::{Axis, Place};

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
        let mut parts = match live.pick(id) {
            Some(picked) => last_of_each_rank(picked.parts),
            None => self.older(id)?,
        };
        live.scattered(id).settle(&mut parts);
        let shown = match rank {
            None => parts.clone(),
            Some(rank) => parts.iter().filter(|p| p.what.rank == rank).map(alone).collect(),
        };
        let Some(first) = shown.first().map(|p| p.what.clone()) else {
            let have: Vec<String> = parts.iter().map(|p| p.what.rank.to_string()).collect();
            return Err(format!("no part from this rank; there are those of ranks {}", have.join(", ")));
        };
        let node = layout::plan(&shown).map_err(|e| e.to_string())?;
        let mut leaves = Vec::new();
        let summed = walk(&node, &mut leaves);
        leaves.sort_unstable();
        leaves.dedup();
        let mut places: Vec<Option<Location>> = vec![None; shown.len()];
        for &leaf in &leaves {
            places[leaf] = Some(place(&shown[leaf])?.clone());
        }
        let source = Source::new(&node, first.dtype, Windows::new(&self.shards, places)?);
        let whole = leaves.iter().map(|&i| &shown[i]).filter_map(|p| p.at.as_ref()).map(|at| at.len).sum();
        let known = if summed { None } else { leaves.iter().map(|&i| shown[i].stats).collect() };
        Ok(Look {
            id: id.clone(),
            name: id.to_string(),
            class: first.class,
            dtype: first.dtype.name(),
            shape: node.shape().to_vec(),
            layout: layout_lines(&parts[0].what.axes),
            dp_size: layout::data_size(&parts),
            bytes: whole,
            time_ms: first.time_ns as f64 / 1e6,
            parts: parts.iter().map(PartLook::of).collect(),
            rank,
            picture: picture::draw(node.shape(), &|row, start, out| source.read(row, start, out), known)?,
        })
    }

    /// The parts of a record that is no longer among the newest. No more than a line of the manifest is held.
    fn older(&self, id: &Identity) -> Result<Vec<Part>, String> {
        let path = self.run_dir.join(MANIFEST_FILE);
        let found = File::open(&path).and_then(|file| scan(file, id)).or_else(|e| match e.kind() {
            io::ErrorKind::NotFound => Ok(Vec::new()),
            _ => Err(format!("{}: {e}", path.display())),
        })?;
        if found.is_empty() { Err(format!("{id} was not captured, or not yet")) } else { Ok(found) }
    }
}

/// Where a part's bytes are.
fn place(part: &Part) -> Result<&Location, String> {
    let rank = part.what.rank;
    let at = part.at.as_ref().ok_or_else(|| format!("rank {rank} kept statistics only (reduce=stats)"))?;
    if layout::byte_len(part.what.dtype, &part.what.shape) != Some(at.len) {
        return Err(format!("rank {rank}: the stored length does not fit the shape; run flexmodel verify"));
    }
    Ok(at)
}

fn scan(manifest: File, id: &Identity) -> io::Result<Vec<Part>> {
    let mut lines = Reader::new(BufReader::with_capacity(1 << 18, manifest));
    let mut found = BTreeMap::new();
    while let Some(entry) = lines.next_line()? {
        // What does not read is no part; verify names it.
        if let Ok(Line::Part(part)) = entry.line
            && part.what.id == *id
        {
            found.insert(part.what.rank, part);
        }
    }
    Ok(found.into_values().collect())
}

/// In order of the ranks. Where a rank captured a record again, its last part counts.
fn last_of_each_rank(parts: Vec<Part>) -> Vec<Part> {
    let by_rank: BTreeMap<u32, Part> = parts.into_iter().map(|part| (part.what.rank, part)).collect();
    by_rank.into_values().collect()
}

/// A part without its place on the mesh: a tensor of its own.
fn alone(part: &Part) -> Part {
    let mut part = part.clone();
    part.what.axes.clear();
    part
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
        let how = match &axis.place {
            Place::Replicate => "replicated".to_owned(),
            Place::Shard { dim } => format!("shard of dim {dim}"),
            Place::ReplicateOrShard { dim } => format!("shard of dim {dim}, or replicated where equal"),
            Place::Flat { shape } => format!("run of the elements of {shape:?}"),
            Place::HeadTail { dim } => format!("two pieces of dim {dim}, from its head and its tail"),
            Place::Partial => "addends".to_owned(),
            Place::Unknown => "not known".to_owned(),
        };
        let ranks = if axis.size == 1 { "rank" } else { "ranks" };
        format!("{}: {how}, {} {ranks}", axis.name, axis.size)
    };
    axes.iter().map(line).collect()
}

/// Adds the parts that the whole is made of; says whether any are addends.
fn walk(node: &Node, leaves: &mut Vec<usize>) -> bool {
    match node {
        Node::Leaf { part, .. } => {
            leaves.push(*part);
            false
        }
        Node::Flat { child, .. } => walk(child, leaves),
        Node::Concat { children, .. } | Node::HeadTail { children, .. } => {
            let sums = children.iter().filter(|child| walk(child, leaves)).count();
            sums > 0
        }
        Node::Sum { children, .. } => {
            children.iter().for_each(|child| _ = walk(child, leaves));
            true
        }
    }
}

#[cfg(test)]
#[path = "tensor_tests.rs"]
mod tests;
