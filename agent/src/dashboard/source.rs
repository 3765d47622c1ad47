//! The executor of a plan that reads single elements: through the plan's tree, out of the parts that the whole is made of.

use std::cell::RefCell;

use flexmodel_run::{
    read::{
        number::component,
        rows::Pad,
        tree::{self, Node, Piece},
    },
    stats,
};
use wire::dtype::DType;

use super::windows::Parts;

/// Reads elements of the whole without making it.
pub struct Source<'a, P> {
    node: &'a Node,
    dtype: DType,
    parts: RefCell<P>,
}

impl<'a, P: Parts> Source<'a, P> {
    /// Of the whole that a plan's tree makes of these parts.
    pub fn new(node: &'a Node, dtype: DType, parts: P) -> Self {
        Self { node, dtype, parts: RefCell::new(parts) }
    }

    /// Elements `start..` of the row at `row` (all coordinates but the last); complex ones as magnitudes.
    pub fn read(&self, row: &[u64], start: u64, out: &mut [f64]) -> Result<(), String> {
        self.fill(self.node, &mut row.to_vec(), start, 0, out)?;
        if self.dtype.is_complex() {
            let mut imaginary = vec![0.0; out.len()];
            self.fill(self.node, &mut row.to_vec(), start, 1, &mut imaginary)?;
            out.iter_mut().zip(imaginary).for_each(|(re, im)| *re = re.hypot(im));
        }
        Ok(())
    }

    /// `half`: which of the two components of a complex element.
    fn fill(&self, node: &Node, row: &mut [u64], start: u64, half: usize, out: &mut [f64]) -> Result<(), String> {
        match node {
            Node::Leaf { part, shape } => self.leaf(*part, shape, row, start, half, out),
            Node::Concat { dim, children, .. } | Node::HeadTail { dim, children, .. } => {
                let pieces = tree::pieces(children, *dim, matches!(node, Node::HeadTail { .. }));
                self.fill_from(&pieces, *dim, row, start, half, out)
            }
            Node::Rows { children, shape, pad } => self.rows(children, shape, pad, row, start, half, out),
            Node::Flat { child, shape } => self.fill(child, &mut [], element(shape, row, start), half, out),
            Node::Sum { children, .. } => {
                let mut addend = vec![0.0; out.len()];
                out.fill(0.0);
                for child in children {
                    self.fill(child, row, start, half, &mut addend)?;
                    out.iter_mut().zip(&addend).for_each(|(sum, x)| *sum += x);
                }
                Ok(())
            }
        }
    }

    /// Of pieces that follow each other on `dim`.
    fn fill_from(
        &self,
        pieces: &[Piece<'_>],
        dim: usize,
        row: &mut [u64],
        start: u64,
        half: usize,
        out: &mut [f64],
    ) -> Result<(), String> {
        let mut begin = 0u64;
        if dim == row.len() {
            // Along the row: each fills what it has of it.
            let last = start + out.len() as u64;
            for piece in pieces {
                let end = begin + piece.len;
                let (from, to) = (start.max(begin), last.min(end));
                if from < to {
                    let out = &mut out[(from - start) as usize..(to - start) as usize];
                    self.fill(piece.node, row, piece.start + from - begin, half, out)?;
                }
                begin = end;
            }
            return Ok(());
        }
        let at = row[dim];
        for piece in pieces {
            if at < begin + piece.len {
                row[dim] = piece.start + at - begin;
                self.fill(piece.node, row, start, half, out)?;
                break;
            }
            begin += piece.len;
        }
        row[dim] = at;
        Ok(())
    }

    /// Of rows that are filled up.
    #[allow(clippy::too_many_arguments)]
    fn rows(
        &self,
        children: &[Node],
        whole: &[u64],
        pad: &Pad,
        row: &mut [u64],
        start: u64,
        half: usize,
        out: &mut [f64],
    ) -> Result<(), String> {
        let real = component(self.dtype);
        let element = pad.element(self.dtype).get(half * real.size()..(half + 1) * real.size()).unwrap_or_default();
        out.fill(stats::to_f64(real, element));
        let Some((&number, inner)) = row.split_first() else { return Ok(()) };
        let mut begin = 0;
        for child in children {
            let rows = child.shape().first().copied().unwrap_or_default();
            if number >= begin + rows {
                begin += rows;
                continue;
            }
            // Where the piece has this row, and from where on, along the last dimension.
            let mut own = vec![number - begin];
            let sizes: Vec<(u64, u64)> = whole.iter().copied().zip(child.shape().iter().copied()).skip(1).collect();
            for (&at, &(all, size)) in inner.iter().zip(&sizes) {
                match at.checked_sub(pad.offset(all, size)).filter(|&at| at < size) {
                    Some(at) => own.push(at),
                    None => return Ok(()),
                }
            }
            let Some(&(all, size)) = sizes.last() else { return Ok(()) };
            let first = pad.offset(all, size);
            let (from, to) = (start.max(first), (start + out.len() as u64).min(first + size));
            if from < to {
                let out = &mut out[(from - start) as usize..(to - start) as usize];
                self.fill(child, &mut own, from - first, half, out)?;
            }
            break;
        }
        Ok(())
    }

    fn leaf(
        &self,
        part: usize,
        shape: &[u64],
        row: &[u64],
        start: u64,
        half: usize,
        out: &mut [f64],
    ) -> Result<(), String> {
        let (size, real) = (self.dtype.size(), component(self.dtype));
        let begin = element(shape, row, start) * size as u64;
        let mut parts = self.parts.borrow_mut();
        let elements = parts.bytes(part, begin, out.len() * size)?;
        for (x, element) in out.iter_mut().zip(elements.chunks_exact(size)) {
            *x = stats::to_f64(real, &element[half * real.size()..(half + 1) * real.size()]);
        }
        Ok(())
    }
}

/// The number of element `start` of the row at `row`, in row-major order.
fn element(shape: &[u64], row: &[u64], start: u64) -> u64 {
    let flat = row.iter().zip(shape).fold(0u64, |flat, (at, dim)| flat * dim + at);
    flat * shape.last().copied().unwrap_or(1) + start
}
