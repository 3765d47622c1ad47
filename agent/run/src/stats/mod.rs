//! Statistics of tensors, in one pass over bytes that arrive in pieces.
//!
//! Elements go through small blocks that stay in the first-level cache. Within a block sums are taken around the mean
//! of the block before it, and blocks are joined by Chan's rule, so that a large mean does not drown a small deviation.

mod convert;
mod kernel;

use wire::dtype::DType;

use super::format::Stats;
use convert::Wide;
pub use convert::{to_f64, widen};
use kernel::{BLOCK, Block};

/// Largest element in bytes.
const MAX_ELEMENT: usize = 16;

/// Takes a tensor's bytes, piece by piece, and tells its statistics at any time.
#[derive(Clone, Debug)]
pub struct Accumulator {
    dtype: DType,
    moments: Moments,
    nan: u64,
    inf: u64,
    zero: u64,
    /// The start of an element whose end comes with the next piece.
    carry: [u8; MAX_ELEMENT],
    carried: usize,
}

impl Accumulator {
    /// Nothing seen yet.
    pub fn new(dtype: DType) -> Self {
        Self { dtype, moments: Moments::EMPTY, nan: 0, inf: 0, zero: 0, carry: [0; MAX_ELEMENT], carried: 0 }
    }

    /// Takes the next bytes. An element may lie across two calls.
    pub fn update(&mut self, mut bytes: &[u8]) {
        let size = self.dtype.size();
        if self.carried > 0 {
            let (head, rest) = bytes.split_at(bytes.len().min(size - self.carried));
            self.carry[self.carried..self.carried + head.len()].copy_from_slice(head);
            self.carried += head.len();
            bytes = rest;
            if self.carried < size {
                return;
            }
            let element = self.carry;
            self.carried = 0;
            self.elements(&element[..size]);
        }
        let (whole, rest) = bytes.split_at(bytes.len() - bytes.len() % size);
        self.elements(whole);
        self.carry[..rest.len()].copy_from_slice(rest);
        self.carried = rest.len();
    }

    /// Whole elements only.
    fn elements(&mut self, bytes: &[u8]) {
        match convert::wide(self.dtype) {
            Wide::F32(fill) => {
                let mut values = [0f32; BLOCK];
                for chunk in bytes.chunks(BLOCK * self.dtype.size()) {
                    let values = &mut values[..chunk.len() / self.dtype.size()];
                    fill(chunk, values);
                    let block = kernel::f32s(values, self.moments.shift());
                    self.take(block, || values.iter().map(|&x| f64::from(x)));
                }
            }
            Wide::F64(fill) => {
                let mut values = [0f64; BLOCK];
                for chunk in bytes.chunks(BLOCK * self.dtype.size()) {
                    let values = &mut values[..chunk.len() / self.dtype.size()];
                    fill(chunk, values);
                    let block = kernel::f64s(values, self.moments.shift());
                    self.take(block, || values.iter().copied());
                }
            }
        }
    }

    /// Takes a block's sums, or goes through its elements one by one if some are not finite.
    fn take<I: Iterator<Item = f64>>(&mut self, block: Block, values: impl Fn() -> I) {
        if block.finite {
            self.zero += block.zeros;
            self.moments = self.moments.join(Moments::of(&block));
            return;
        }
        for x in values() {
            if x.is_nan() {
                self.nan += 1;
            } else if x.is_infinite() {
                self.inf += 1;
            } else {
                self.zero += u64::from(x == 0.0);
                self.moments = self.moments.join(Moments { n: 1.0, mean: x, m2: 0.0, min: x, max: x });
            }
        }
    }

    /// The statistics so far.
    pub fn stats(&self) -> Stats {
        self.moments.stats(self.nan, self.inf, self.zero)
    }
}

/// Statistics of a whole tensor.
pub fn compute(dtype: DType, bytes: &[u8]) -> Option<Stats> {
    let mut all = Accumulator::new(dtype);
    all.update(bytes);
    Some(all.stats())
}

/// Of finite elements.
#[derive(Clone, Copy, Debug)]
struct Moments {
    n: f64,
    mean: f64,
    /// Sum of squared distances from the mean.
    m2: f64,
    min: f64,
    max: f64,
}

impl Moments {
    const EMPTY: Self = Self { n: 0.0, mean: 0.0, m2: 0.0, min: f64::INFINITY, max: f64::NEG_INFINITY };

    fn of(block: &Block) -> Self {
        let n = block.count as f64;
        if n == 0.0 {
            return Self::EMPTY;
        }
        let off = block.sum / n;
        // Rounding can take it below zero. Not a number (sums past the range of f64) stays so.
        let m2 = block.squares - block.sum * off;
        let m2 = if m2 < 0.0 { 0.0 } else { m2 };
        Self { n, mean: block.shift + off, m2, min: block.min, max: block.max }
    }

    fn join(self, other: Self) -> Self {
        if self.n == 0.0 {
            return other;
        }
        if other.n == 0.0 {
            return self;
        }
        let n = self.n + other.n;
        let delta = other.mean - self.mean;
        Self {
            n,
            mean: self.mean + delta * (other.n / n),
            m2: self.m2 + other.m2 + delta * delta * (self.n * other.n / n),
            min: self.min.min(other.min),
            max: self.max.max(other.max),
        }
    }

    /// What the next block's sums are taken around; `None` before the first.
    fn shift(&self) -> Option<f64> {
        (self.n > 0.0 && self.mean.is_finite()).then_some(self.mean)
    }

    fn stats(&self, nan: u64, inf: u64, zero: u64) -> Stats {
        let count = self.n as u64 + nan + inf;
        let known = |x: f64| x.is_finite().then_some(x);
        if self.n == 0.0 {
            return Stats { count, nan, inf, zero, ..Stats::default() };
        }
        Stats {
            count,
            mean: known(self.mean),
            std: known((self.m2 / self.n).sqrt()),
            l2: known((self.m2 + self.n * self.mean * self.mean).sqrt()),
            absmax: known(self.min.abs().max(self.max.abs())),
            min: known(self.min),
            max: known(self.max),
            nan,
            inf,
            zero,
        }
    }
}

impl Stats {
    /// Statistics of both tensors' elements together.
    pub fn merge(&self, other: &Self) -> Self {
        self.moments().join(other.moments()).stats(self.nan + other.nan, self.inf + other.inf, self.zero + other.zero)
    }

    fn moments(&self) -> Moments {
        let n = self.count.saturating_sub(self.nan).saturating_sub(self.inf) as f64;
        if n == 0.0 {
            return Moments::EMPTY;
        }
        // A null that is not for want of elements was past the range of f64.
        let of = |x: Option<f64>| x.unwrap_or(f64::NAN);
        let std = of(self.std);
        Moments { n, mean: of(self.mean), m2: std * std * n, min: of(self.min), max: of(self.max) }
    }
}

#[cfg(test)]
mod tests;
