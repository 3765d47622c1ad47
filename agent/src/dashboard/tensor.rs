//! One tensor for the page: found, laid out, sampled within a bound, described.
//!
//! A record among the newest is read by the places that [`Live`] remembers; for an older one the run's manifest is gone
//! through line by line, and nothing of it is kept. No checksum of a tensor is compared here (that would read every
//! byte); `flexmodel verify` does that.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, BufReader},
    path::{Path, PathBuf},
};

use serde::Serialize;
use wire::{
    dtype::DType,
    record::{Axis, Place},
};

use super::picture::{self, Picture};
use crate::{
    live::Live,
    read::{
        Shards,
        assemble::Bytes,
        layout::{self, Node, Piece},
        number::component,
    },
    store::{
        format::{Identity, Line, MANIFEST_FILE, Part},
        manifest::Reader,
        stats,
    },
};

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
        live.scattered().settle(&mut parts);
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
        let mut bytes: Vec<Option<Bytes>> = vec![None; shown.len()];
        for &leaf in &leaves {
            bytes[leaf] = Some(self.bytes(&shown[leaf])?);
        }
        let source = Source { node: &node, dtype: first.dtype, bytes: &bytes };
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
            picture: picture::draw(node.shape(), &|row, start, out| source.read(row, start, out), known),
        })
    }

    fn bytes(&self, part: &Part) -> Result<Bytes, String> {
        let rank = part.what.rank;
        let at = part.at.as_ref().ok_or_else(|| format!("rank {rank} kept statistics only (reduce=stats)"))?;
        if layout::byte_len(part.what.dtype, &part.what.shape) != Some(at.len) {
            return Err(format!("rank {rank}: the stored length does not fit the shape; run flexmodel verify"));
        }
        self.shards.bytes(at).map_err(|e| e.to_string())
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
            Place::Shard { dim, .. } => format!("shard of dim {dim}"),
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

/// Reads elements of the whole without making it.
struct Source<'a> {
    node: &'a Node,
    dtype: DType,
    bytes: &'a [Option<Bytes>],
}

impl Source<'_> {
    /// Elements `start..` of the row at `row` (all coordinates but the last); complex ones as magnitudes.
    fn read(&self, row: &[u64], start: u64, out: &mut [f64]) {
        if self.dtype.is_complex() {
            let mut imaginary = vec![0.0; out.len()];
            self.fill(self.node, &mut row.to_vec(), start, 0, out);
            self.fill(self.node, &mut row.to_vec(), start, 1, &mut imaginary);
            out.iter_mut().zip(imaginary).for_each(|(re, im)| *re = re.hypot(im));
        } else {
            self.fill(self.node, &mut row.to_vec(), start, 0, out);
        }
    }

    /// `half`: which of the two components of a complex element.
    fn fill(&self, node: &Node, row: &mut [u64], start: u64, half: usize, out: &mut [f64]) {
        match node {
            Node::Leaf { part, shape } => self.leaf(*part, shape, row, start, half, out),
            Node::Concat { dim, children, .. } | Node::HeadTail { dim, children, .. } => {
                let pieces = layout::pieces(children, *dim, matches!(node, Node::HeadTail { .. }));
                self.fill_from(&pieces, *dim, row, start, half, out);
            }
            Node::Flat { child, shape } => self.fill(child, &mut [], element(shape, row, start), half, out),
            Node::Sum { children, .. } => {
                let mut addend = vec![0.0; out.len()];
                out.fill(0.0);
                for child in children {
                    self.fill(child, row, start, half, &mut addend);
                    out.iter_mut().zip(&addend).for_each(|(sum, x)| *sum += x);
                }
            }
        }
    }

    /// Of pieces that follow each other on `dim`.
    fn fill_from(&self, pieces: &[Piece<'_>], dim: usize, row: &mut [u64], start: u64, half: usize, out: &mut [f64]) {
        let mut begin = 0u64;
        if dim == row.len() {
            // Along the row: each fills what it has of it.
            let last = start + out.len() as u64;
            for piece in pieces {
                let end = begin + piece.len;
                let (from, to) = (start.max(begin), last.min(end));
                if from < to {
                    let out = &mut out[(from - start) as usize..(to - start) as usize];
                    self.fill(piece.node, row, piece.start + from - begin, half, out);
                }
                begin = end;
            }
            return;
        }
        let at = row[dim];
        for piece in pieces {
            if at < begin + piece.len {
                row[dim] = piece.start + at - begin;
                self.fill(piece.node, row, start, half, out);
                break;
            }
            begin += piece.len;
        }
        row[dim] = at;
    }

    fn leaf(&self, part: usize, shape: &[u64], row: &[u64], start: u64, half: usize, out: &mut [f64]) {
        let (size, real) = (self.dtype.size(), component(self.dtype));
        let first = element(shape, row, start);
        // `Tensors::bytes` made sure that the bytes are as many as the shape says, so every index fits.
        let bytes = self.bytes.get(part).and_then(Option::as_deref).unwrap_or_default();
        let begin = first as usize * size;
        let elements = bytes.get(begin..begin + out.len() * size).unwrap_or_default();
        for (x, element) in out.iter_mut().zip(elements.chunks_exact(size)) {
            *x = stats::to_f64(real, &element[half * real.size()..(half + 1) * real.size()]);
        }
    }
}

/// The number of element `start` of the row at `row`, in row-major order.
fn element(shape: &[u64], row: &[u64], start: u64) -> u64 {
    let flat = row.iter().zip(shape).fold(0u64, |flat, (at, dim)| flat * dim + at);
    flat * shape.last().copied().unwrap_or(1) + start
}

#[cfg(test)]
#[path = "tensor_tests.rs"]
mod tests;
