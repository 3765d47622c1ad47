//! The assembly of a record as data: which bytes of which part go where, or why they do not make a whole.
//!
//! Making a plan touches no byte of a tensor and no file. Executors carry a plan out, each in its own way, and decide
//! nothing about layouts: [`super::assemble`] makes the bytes of the whole out of mapped shards, and the agent's page
//! reads single elements by pread. An executor walks [`AssemblyPlan::tree`] and asks for the bytes of its leaves.

use wire::dtype::DType;

use super::{
    layout::{self, LayoutError, byte_len},
    rows::Pad,
    tree::Node,
};
use crate::format::{Location, Part, Stats};

/// How the parts of a record make the whole.
#[derive(Clone, Debug, PartialEq)]
pub struct AssemblyPlan {
    /// Element type of every part, and of the whole.
    pub dtype: DType,
    /// What goes where. Its leaves are indices into the record's parts.
    pub tree: Node,
    /// Where the bytes of each part lie, by its index; `None` for a part that `tree` has no leaf of, such as a replica.
    pub sources: Vec<Option<Location>>,
    /// Statistics of the whole, where those of the parts say them.
    pub stats: Option<Stats>,
}

/// Why there is no plan.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// The layouts of the parts do not make a whole, or parts are missing.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// No bytes of a part were stored.
    #[error("rank {rank} {}", without_bytes(*.checksum))]
    NoBytes {
        /// Whose part.
        rank: u32,
        /// It sent the checksum of a replica, and no replica has that checksum; otherwise, only statistics were wanted.
        checksum: bool,
    },
    /// A part has more or fewer bytes than its shape says.
    #[error("{} bytes are not a {} of shape {shape:?}", .at.len, .dtype.name())]
    Length {
        /// Whose part.
        rank: u32,
        /// Where it lies.
        at: Location,
        /// Its element type.
        dtype: DType,
        /// Its shape.
        shape: Vec<u64>,
    },
    /// Two pieces of the whole have a byte in common: a small file would make a whole of any size.
    #[error("two of its pieces have the byte {byte} of {shard}")]
    Overlap {
        /// Stem of the shard.
        shard: String,
        /// From the start of its file.
        byte: u64,
    },
}

impl AssemblyPlan {
    /// Plans the whole of a record's parts. Takes hostile parts.
    pub fn new(parts: &[Part]) -> Result<Self, PlanError> {
        Self::of(layout::plan(parts)?, parts)
    }

    /// The same, with rows that ranks padded to their own longest filled up by `pad`.
    pub fn padded(parts: &[Part], pad: &Pad) -> Result<Self, PlanError> {
        Self::of(layout::padded(parts, pad)?, parts)
    }

    fn of(tree: Node, parts: &[Part]) -> Result<Self, PlanError> {
        // There is a first part where there is a layout.
        let dtype = parts.first().map_or(DType::UInt8, |part| part.what.dtype);
        expect_apart(&tree, parts)?;
        let mut sources = vec![None; parts.len()];
        for leaf in tree.leaves() {
            if let (Some(part), Some(into)) = (parts.get(leaf), sources.get_mut(leaf)) {
                *into = Some(source(part)?.clone());
            }
        }
        let stats = layout::stats(&tree, parts);
        Ok(Self { dtype, tree, sources, stats })
    }

    /// Shape of the whole.
    pub fn shape(&self) -> &[u64] {
        self.tree.shape()
    }

    /// Bytes that are read for it.
    pub fn bytes(&self) -> u64 {
        crate::text::total(self.sources.iter().flatten().map(|at| at.len))
    }
}

/// Where the bytes of a part lie, as many as its shape says.
pub fn source(part: &Part) -> Result<&Location, PlanError> {
    let what = &part.what;
    let at = part.at.as_ref().ok_or(PlanError::NoBytes { rank: what.rank, checksum: part.same.is_some() })?;
    if byte_len(what.dtype, &what.shape) != Some(at.len) {
        let (rank, at, dtype, shape) = (what.rank, at.clone(), what.dtype, what.shape.clone());
        return Err(PlanError::Length { rank, at, dtype, shape });
    }
    Ok(at)
}

fn without_bytes(checksum: bool) -> &'static str {
    if checksum { "sent a checksum, and no rank bytes that have it" } else { "kept statistics only (reduce=stats)" }
}

/// Pieces of one whole have bytes of their own.
pub fn expect_apart(tree: &Node, parts: &[Part]) -> Result<(), PlanError> {
    let leaves = tree.leaves();
    if leaves.len() < 2 {
        return Ok(());
    }
    let at = leaves.iter().filter_map(|&leaf| parts.get(leaf)?.at.as_ref()).filter(|at| at.len > 0);
    let mut ranges: Vec<(&str, u64, u64)> = at.map(|at| (at.shard.as_str(), at.offset, at.len)).collect();
    ranges.sort_unstable();
    match ranges.windows(2).find(|two| two[0].0 == two[1].0 && two[1].1 - two[0].1 < two[0].2) {
        Some(two) => Err(PlanError::Overlap { shard: two[1].0.to_owned(), byte: two[1].1 }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use wire::record::Placement;

    use super::*;
    use crate::{format::What, testing};

    fn parts(place: &Placement) -> Vec<Part> {
        let part = |rank: u32| {
            let what = What::from_meta(testing::on_rank(testing::meta("m", 0, 2), rank, 2, place.clone()));
            let at = Location { shard: "shard-00000".into(), offset: 4096 + 32 * u64::from(rank), len: 32, crc: 5 };
            Part { what, at: Some(at), stats: None, same: None }
        };
        vec![part(0), part(1)]
    }

    #[test]
    fn a_plan_says_where_the_bytes_of_every_piece_lie() {
        let mut pieces = parts(&testing::batch());
        let plan = AssemblyPlan::new(&pieces).unwrap();
        assert_eq!((plan.dtype, plan.shape(), plan.bytes()), (DType::Float32, &[4, 4][..], 64));
        assert_eq!(plan.sources, pieces.iter().map(|part| part.at.clone()).collect::<Vec<_>>());
        let leaf = |part| Node::Leaf { part, shape: vec![2, 4] };
        assert_eq!(plan.tree, Node::Concat { dim: 0, children: vec![leaf(0), leaf(1)], shape: vec![4, 4] });
        assert_eq!(plan.stats, None);
        pieces.iter_mut().for_each(|part| part.stats = Some(Stats { count: 8, ..Stats::default() }));
        assert_eq!(AssemblyPlan::new(&pieces).unwrap().stats.unwrap().count, 16);
    }

    #[test]
    fn a_plan_leaves_out_what_repeats_another_part() {
        let replicas = parts(&Placement::Replicate);
        let plan = AssemblyPlan::new(&replicas).unwrap();
        assert_eq!((plan.bytes(), plan.sources), (32, vec![replicas[0].at.clone(), None]));
    }

    #[test]
    fn what_makes_no_whole_is_refused_with_the_reason() {
        let refusal = |change: &dyn Fn(&mut Vec<Part>)| {
            let mut pieces = parts(&testing::batch());
            change(&mut pieces);
            AssemblyPlan::new(&pieces).unwrap_err()
        };
        let missing = LayoutError::Missing(vec![vec![("dp".into(), 0, 2)]]);
        assert_eq!(refusal(&|p| _ = p.remove(0)), missing.into());
        assert_eq!(refusal(&|p| p[1].at = None), PlanError::NoBytes { rank: 1, checksum: false });
        let checksum = refusal(&|p| (p[1].at, p[1].same) = (None, Some(1)));
        assert_eq!(checksum, PlanError::NoBytes { rank: 1, checksum: true });
        let short = refusal(&|p| p[0].at.as_mut().unwrap().len = 31);
        assert_eq!(short.to_string(), "31 bytes are not a float32 of shape [2, 4]");
        let overlap = refusal(&|p| p[1].at.as_mut().unwrap().offset -= 1);
        assert_eq!(overlap, PlanError::Overlap { shard: "shard-00000".into(), byte: 4127 });
    }
}
