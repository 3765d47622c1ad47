//! Carries out a plan into memory that is the caller's own: a private map of a shard where the whole lies there in
//! one piece, else memory that parts are read into, each straight to its place.

use std::{io, os::unix::fs::FileExt};

use memmap2::{MmapMut, MmapOptions};
use wire::dtype::DType;

use super::{Shards, layout::byte_len, number, plan::AssemblyPlan, rows::Pad, shards::ReadError, tree::Node};
use crate::format::Location;

/// Bytes from which on mapping a tensor is quicker than reading it.
const MAP_FROM: u64 = 1 << 16;

/// Bytes of a tensor that may be written to. Writing changes no file.
pub enum Own {
    /// Pages of a shard, copied when they are written to, or new ones.
    Mapped(MmapMut),
    /// Read.
    Read(Vec<u8>),
}

impl std::ops::Deref for Own {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        match self {
            Own::Mapped(map) => map,
            Own::Read(bytes) => bytes,
        }
    }
}

impl std::ops::DerefMut for Own {
    fn deref_mut(&mut self) -> &mut [u8] {
        match self {
            Own::Mapped(map) => map,
            Own::Read(bytes) => bytes,
        }
    }
}

/// The bytes of the whole. Checksums are not compared: `flexmodel verify` does that.
pub fn own(plan: &AssemblyPlan, shards: &Shards) -> Result<Own, ReadError> {
    own_of(&plan.tree, plan, shards)
}

/// The bytes of a node of the plan's tree, as those of the whole.
pub fn own_of(node: &Node, plan: &AssemblyPlan, shards: &Shards) -> Result<Own, ReadError> {
    let from = From { plan, shards };
    let len = from.bytes(node)?;
    if len == 0 {
        return Ok(Own::Read(Vec::new()));
    }
    if let Some(at) = from.one_piece(node)?
        && at.len >= MAP_FROM
    {
        let file = shards.holding(&at)?;
        // SAFETY: the map is private, so that what is written to it stays here. Bytes that a manifest line speaks of never
        // change and the file never shrinks (the store's rule). Who truncates a shard by hand meanwhile gets SIGBUS, as with
        // every mmap reader.
        let map = unsafe { MmapOptions::new().offset(at.offset).len(len).no_reserve_swap().map_copy(&file) };
        if let Ok(map) = map {
            return Ok(Own::Mapped(map));
        }
        // No more maps are to be had: it is read.
    }
    let mut out = room(len)?;
    from.fill(node, &Block::whole(node.shape(), plan.dtype), &mut out)?;
    Ok(out)
}

fn room(len: usize) -> Result<Own, ReadError> {
    if (len as u64) < MAP_FROM {
        return Ok(Own::Read(vec![0; len]));
    }
    // Unlike an allocation, a map that there is no memory for is an error.
    MmapMut::map_anon(len)
        .map(Own::Mapped)
        .map_err(|e| ReadError::Damage(format!("there is no memory for {len} bytes ({e})")))
}

/// Where the elements of a tensor lie in memory: that of the first, and how far it is to the next along each dimension.
pub struct Block {
    offset: usize,
    strides: Vec<usize>,
}

impl Block {
    /// Side by side. The bytes of the shape fit into memory.
    pub fn whole(shape: &[u64], dtype: DType) -> Self {
        let mut stride = dtype.size();
        let mut strides: Vec<usize> = Vec::with_capacity(shape.len());
        for &len in shape.iter().rev() {
            strides.push(stride);
            stride = stride.saturating_mul(len as usize);
        }
        strides.reverse();
        Self { offset: 0, strides }
    }

    /// From `start` on along `dim`.
    fn from(&self, dim: usize, start: u64) -> Self {
        let step = self.strides.get(dim).copied().unwrap_or_default();
        Self { offset: self.offset + start as usize * step, strides: self.strides.clone() }
    }

    /// Of a piece from row `start` on, among rows of the shape of `whole`.
    pub fn rows(&self, start: u64, whole: &[u64], piece: &[u64], pad: &Pad) -> Self {
        let sizes = whole.iter().zip(piece).enumerate().skip(1);
        sizes.fold(self.from(0, start), |block, (dim, (&all, &own))| block.from(dim, pad.offset(all, own)))
    }

    /// The last dimensions of `shape` that lie side by side: where they begin, and their bytes.
    fn run(&self, shape: &[u64], element: usize) -> (usize, usize) {
        let (mut depth, mut width) = (shape.len(), element);
        while depth > 0 && (self.strides[depth - 1] == width || shape[depth - 1] == 1) {
            depth -= 1;
            width *= shape[depth] as usize;
        }
        (depth, width)
    }
}

struct From<'a> {
    plan: &'a AssemblyPlan,
    shards: &'a Shards,
}

impl From<'_> {
    fn bytes(&self, node: &Node) -> Result<usize, ReadError> {
        byte_len(self.plan.dtype, node.shape())
            .and_then(|n| usize::try_from(n).ok())
            .ok_or_else(|| ReadError::Damage(format!("a tensor of shape {:?} does not fit into memory", node.shape())))
    }

    fn at(&self, part: usize) -> Result<&Location, ReadError> {
        let source = self.plan.sources.get(part).and_then(Option::as_ref);
        source.ok_or_else(|| ReadError::Damage("a part that is not there".into()))
    }

    /// The range of a shard that the bytes of a node are, if they are one.
    fn one_piece(&self, node: &Node) -> Result<Option<Location>, ReadError> {
        match node {
            Node::Leaf { part, .. } => self.at(*part).cloned().map(Some),
            Node::Flat { child, .. } => self.one_piece(child),
            Node::Rows { .. } | Node::Sum { .. } | Node::HeadTail { .. } => Ok(None),
            Node::Concat { dim, children, shape } => {
                if shape.iter().take(*dim).any(|&len| len != 1) {
                    return Ok(None);
                }
                let mut whole: Option<Location> = None;
                for child in children.iter().filter(|child| !child.shape().contains(&0)) {
                    let Some(next) = self.one_piece(child)? else { return Ok(None) };
                    whole = Some(match whole {
                        None => next,
                        Some(so_far) if so_far.shard == next.shard && so_far.offset + so_far.len == next.offset => {
                            Location { len: so_far.len + next.len, ..so_far }
                        }
                        Some(_) => return Ok(None),
                    });
                }
                Ok(whole)
            }
        }
    }

    fn fill(&self, node: &Node, to: &Block, out: &mut [u8]) -> Result<(), ReadError> {
        let shape = node.shape();
        if shape.contains(&0) {
            return Ok(());
        }
        let (depth, width) = to.run(shape, self.plan.dtype.size());
        match node {
            Node::Leaf { part, .. } => {
                let at = self.at(*part)?;
                if depth == 0 {
                    return self.shards.read_into(at, piece(out, to.offset, width)?);
                }
                scatter(&self.apart(node)?, shape, to, self.plan.dtype.size(), out)
            }
            Node::Concat { dim, children, .. } => {
                let mut start = 0;
                for child in children {
                    self.fill(child, &to.from(*dim, start), out)?;
                    start += child.shape().get(*dim).copied().unwrap_or_default();
                }
                Ok(())
            }
            Node::Rows { children, pad, .. } => {
                // Memory is new, so it has the zeros that are not written.
                if !pad.is_zero() {
                    let element = pad.element(self.plan.dtype);
                    each_run(shape, to, element.len(), out, &mut |run| {
                        run.chunks_exact_mut(element.len()).for_each(|to| to.copy_from_slice(element));
                    })?;
                }
                let mut start = 0;
                for child in children {
                    self.fill(child, &to.rows(start, shape, child.shape(), pad), out)?;
                    start += child.shape().first().copied().unwrap_or_default();
                }
                Ok(())
            }
            Node::HeadTail { dim, children, .. } => {
                let (mut head, mut tail) = (0, shape.get(*dim).copied().unwrap_or_default());
                for child in children {
                    let half = child.shape().get(*dim).copied().unwrap_or_default() / 2;
                    let mut half_shape = child.shape().to_vec();
                    half_shape[*dim] = half;
                    let bytes = self.apart(child)?;
                    // Rows of both halves take turns.
                    let rows: u64 = half_shape.iter().take(*dim).product();
                    let width = bytes.len() / (2 * rows.max(1) as usize).max(1);
                    tail -= half;
                    scatter(
                        &every_second(&bytes, width, 0)?,
                        &half_shape,
                        &to.from(*dim, head),
                        self.plan.dtype.size(),
                        out,
                    )?;
                    scatter(
                        &every_second(&bytes, width, 1)?,
                        &half_shape,
                        &to.from(*dim, tail),
                        self.plan.dtype.size(),
                        out,
                    )?;
                    head += half;
                }
                Ok(())
            }
            Node::Flat { child, .. } if depth == 0 => {
                let mut to_child = Block::whole(child.shape(), self.plan.dtype);
                to_child.offset = to.offset;
                self.fill(child, &to_child, out)
            }
            Node::Flat { child, .. } => scatter(&self.apart(child)?, shape, to, self.plan.dtype.size(), out),
            Node::Sum { children, .. } => {
                let mut addends = Vec::with_capacity(children.len());
                for child in children {
                    addends.push(match child {
                        Node::Leaf { part, .. } => Addend::There(self.shards.mapped(self.at(*part)?)?),
                        other => Addend::Made(self.apart(other)?),
                    });
                }
                let bytes: Vec<&[u8]> = addends.iter().map(Addend::bytes).collect();
                let mut sum = room(self.bytes(node)?)?;
                number::sum_into(self.plan.dtype, &bytes, &mut sum)?;
                scatter(&sum, shape, to, self.plan.dtype.size(), out)
            }
        }
    }

    /// The bytes of a node by themselves.
    fn apart(&self, node: &Node) -> Result<Own, ReadError> {
        let mut own = room(self.bytes(node)?)?;
        self.fill(node, &Block::whole(node.shape(), self.plan.dtype), &mut own)?;
        Ok(own)
    }
}

enum Addend {
    There(super::assemble::Bytes),
    Made(Own),
}

impl Addend {
    fn bytes(&self) -> &[u8] {
        match self {
            Addend::There(bytes) => bytes,
            Addend::Made(bytes) => bytes,
        }
    }
}

/// One of each two blocks of `width` bytes: the first ones, or the second ones.
fn every_second(bytes: &[u8], width: usize, which: usize) -> Result<Own, ReadError> {
    let (width, mut out) = (width.max(1), room(bytes.len() / 2)?);
    let blocks = bytes.chunks_exact(width).skip(which).step_by(2);
    out.chunks_exact_mut(width).zip(blocks).for_each(|(to, from)| to.copy_from_slice(from));
    Ok(out)
}

fn piece(out: &mut [u8], offset: usize, len: usize) -> Result<&mut [u8], ReadError> {
    // A plan's blocks lie within its whole.
    out.get_mut(offset..offset.saturating_add(len))
        .ok_or_else(|| ReadError::Damage("a piece outside of its whole".into()))
}

/// Writes elements that lie side by side to their places in `out`.
pub fn scatter(bytes: &[u8], shape: &[u64], to: &Block, element: usize, out: &mut [u8]) -> Result<(), ReadError> {
    if bytes.is_empty() {
        return Ok(());
    }
    let mut left = bytes;
    each_run(shape, to, element, out, &mut |run| {
        // There are as many bytes as the shape says.
        let (next, rest) = left.split_at_checked(run.len()).unwrap_or((&[], &[]));
        run.iter_mut().zip(next).for_each(|(to, from)| *to = *from);
        left = rest;
    })
}

/// Gives every stretch of `out` in which elements of a block lie side by side, in order. The shape has elements.
fn each_run(
    shape: &[u64],
    to: &Block,
    element: usize,
    out: &mut [u8],
    write: &mut dyn FnMut(&mut [u8]),
) -> Result<(), ReadError> {
    let (depth, width) = to.run(shape, element);
    let mut index = vec![0u64; depth];
    let mut offset = to.offset;
    for _ in 0..shape.iter().take(depth).product::<u64>() {
        write(piece(out, offset, width)?);
        for dim in (0..depth).rev() {
            index[dim] += 1;
            offset += to.strides[dim];
            if index[dim] < shape[dim] {
                break;
            }
            offset -= index[dim] as usize * to.strides[dim];
            index[dim] = 0;
        }
    }
    Ok(())
}

impl Shards {
    /// The file of a shard, which has these bytes.
    fn holding(&self, at: &Location) -> Result<std::fs::File, ReadError> {
        let file = self.found(&at.shard)?;
        let size = file.metadata().map_err(|e| ReadError::Damage(format!("{}: {e}", at.shard)))?.len();
        let end = at.offset.checked_add(at.len).filter(|_| at.offset >= crate::format::HEADER_SPACE);
        match end {
            None => Err(ReadError::Damage(format!(
                "bytes {}+{} of {} are outside of its tensors",
                at.offset, at.len, at.shard
            ))),
            Some(end) if end > size => Err(ReadError::Damage(too_short(&at.shard, size, end))),
            Some(_) => Ok(file),
        }
    }

    fn read_into(&self, at: &Location, out: &mut [u8]) -> Result<(), ReadError> {
        self.holding(at)?.read_exact_at(out, at.offset).map_err(|e| {
            ReadError::Damage(match e.kind() {
                io::ErrorKind::UnexpectedEof => format!("{} was cut while it was read", at.shard),
                _ => format!("{} cannot be read from byte {} on: {e}", at.shard, at.offset),
            })
        })
    }

    /// What is wrong with a shard that the manifest needs up to byte `end`.
    pub fn problem(&self, stem: &str, end: u64) -> Option<String> {
        match self.found(stem).and_then(|file| file.metadata().map_err(|e| ReadError::Damage(format!("{stem}: {e}")))) {
            Err(e) => Some(e.to_string()),
            Ok(meta) if meta.len() < end => Some(too_short(stem, meta.len(), end)),
            Ok(_) => None,
        }
    }
}

fn too_short(stem: &str, size: u64, end: u64) -> String {
    format!(
        "{stem} is cut short: it has {size} bytes and the manifest names {end}; copy the run again from where it was \
         written, or see `flexmodel verify` for what is lost"
    )
}
