//! The executor of a plan that makes bytes: those of the parts into those of the whole.
//!
//! Nothing here knows layouts, shards or runs: what goes where is in the [`plan`](super::AssemblyPlan), and who calls gives
//! the bytes of its leaves. Other executors stand beside this one and take the same plan.

use std::{ops::Range, sync::Arc};

use wire::dtype::DType;

use super::{
    fill::{self, Block},
    layout::byte_len,
    number,
    shards::{Map, ReadError},
    tree::Node,
};

/// Bytes of a tensor: a range of a mapped shard where they lie there in one piece, else a copy.
#[derive(Clone)]
pub enum Bytes {
    /// In a shard.
    Mapped(Arc<Map>, Range<usize>),
    /// Put together.
    Owned(Vec<u8>),
}

impl std::ops::Deref for Bytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        match self {
            // Ranges are checked against the map when they are made; an empty slice stands for a broken promise.
            Bytes::Mapped(map, range) => map.get(range.clone()),
            Bytes::Owned(bytes) => bytes,
        }
    }
}

impl std::fmt::Debug for Bytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let how = if self.is_mapped() { "mapped" } else { "owned" };
        write!(f, "Bytes({how}, {})", self.len())
    }
}

impl Bytes {
    /// Whether no copy was made.
    pub fn is_mapped(&self) -> bool {
        matches!(self, Bytes::Mapped(..))
    }

    /// `self` and `next` as one range, if `next` starts where `self` ends in the same shard.
    fn join(&self, next: &Bytes) -> Option<Bytes> {
        match (self, next) {
            (Bytes::Mapped(map, a), Bytes::Mapped(other, b)) if Arc::ptr_eq(map, other) && a.end == b.start => {
                Some(Bytes::Mapped(map.clone(), a.start..b.end))
            }
            _ => None,
        }
    }
}

/// A whole tensor.
#[derive(Clone, Debug)]
pub struct Whole {
    /// Element type.
    pub dtype: DType,
    /// Shape.
    pub shape: Vec<u64>,
    /// Row-major elements.
    pub bytes: Bytes,
}

/// Makes the bytes of `node`, a plan's tree; `leaf` gives those of one part, as many as its shape says.
pub fn assemble(
    node: &Node,
    dtype: DType,
    leaf: &mut dyn FnMut(usize) -> Result<Bytes, ReadError>,
) -> Result<Bytes, ReadError> {
    match node {
        Node::Leaf { part, .. } => leaf(*part),
        Node::Concat { dim, children, shape } => {
            let pieces = children.iter().map(|c| assemble(c, dtype, leaf)).collect::<Result<Vec<_>, ReadError>>()?;
            // No prefix of the shape overflows once all of it does not.
            let total = total(dtype, shape)?;
            concat(&pieces, shape.iter().take(*dim).product::<u64>() as usize, total)
        }
        Node::Rows { children, shape, pad } => {
            let (mut out, mut start) = (Vec::new(), 0);
            let total = total(dtype, shape)?;
            out.try_reserve_exact(total).map_err(|_| no_memory(total))?;
            out.extend(pad.element(dtype).iter().cycle().take(total));
            for child in children {
                let bytes = assemble(child, dtype, leaf)?;
                let to = Block::whole(shape, dtype).rows(start, shape, child.shape(), pad);
                fill::scatter(&bytes, child.shape(), &to, dtype.size(), &mut out)?;
                start += child.shape().first().copied().unwrap_or_default();
            }
            Ok(Bytes::Owned(out))
        }
        Node::HeadTail { dim, children, shape } => {
            let pieces = children.iter().map(|c| assemble(c, dtype, leaf)).collect::<Result<Vec<_>, ReadError>>()?;
            let total = total(dtype, shape)?;
            head_tail(&pieces, shape.iter().take(*dim).product::<u64>() as usize, total)
        }
        Node::Flat { child, .. } => assemble(child, dtype, leaf),
        Node::Sum { children, shape } => {
            let pieces = children.iter().map(|c| assemble(c, dtype, leaf)).collect::<Result<Vec<_>, ReadError>>()?;
            total(dtype, shape)?;
            number::sum(dtype, &pieces.iter().map(|p| &**p).collect::<Vec<_>>()).map(Bytes::Owned)
        }
    }
}

fn total(dtype: DType, shape: &[u64]) -> Result<usize, ReadError> {
    byte_len(dtype, shape)
        .and_then(|n| usize::try_from(n).ok())
        .ok_or_else(|| ReadError::Damage(format!("a tensor of shape {shape:?} does not fit into memory")))
}

fn no_memory(total: usize) -> ReadError {
    ReadError::Damage(format!("there is no memory for {total} bytes"))
}

/// As [`concat`], with the first half of every piece's row in order, and then the second halves from last to first.
fn head_tail(pieces: &[Bytes], rows: usize, total: usize) -> Result<Bytes, ReadError> {
    let mut out = Vec::new();
    out.try_reserve_exact(total).map_err(|_| no_memory(total))?;
    for row in 0..rows {
        // All are of one length, which rows and halves divide.
        let half = |piece: &Bytes, second: usize| {
            let width = piece.len() / rows / 2;
            (2 * row + second) * width..(2 * row + second + 1) * width
        };
        pieces.iter().for_each(|piece| out.extend_from_slice(&piece[half(piece, 0)]));
        pieces.iter().rev().for_each(|piece| out.extend_from_slice(&piece[half(piece, 1)]));
    }
    Ok(Bytes::Owned(out))
}

/// Interleaves pieces: row `r` of the result is row `r` of every piece in order.
fn concat(pieces: &[Bytes], rows: usize, total: usize) -> Result<Bytes, ReadError> {
    let filled: Vec<&Bytes> = pieces.iter().filter(|p| !p.is_empty()).collect();
    let Some((first, rest)) = filled.split_first() else { return Ok(Bytes::Owned(Vec::new())) };
    if rest.is_empty() {
        return Ok((*first).clone());
    }
    if rows == 1
        && let Some(one) = rest.iter().try_fold((*first).clone(), |all, next| all.join(next))
    {
        return Ok(one);
    }
    let mut out = Vec::new();
    out.try_reserve_exact(total).map_err(|_| no_memory(total))?;
    for row in 0..rows {
        for piece in &filled {
            // Rows divide every piece: its length is its shape's product, which begins with the rows.
            let width = piece.len() / rows;
            out.extend_from_slice(&piece[row * width..(row + 1) * width]);
        }
    }
    Ok(Bytes::Owned(out))
}
