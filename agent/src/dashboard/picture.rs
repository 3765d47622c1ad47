//! A tensor's histogram, heat map and statistics, from a bounded number of its elements.
//!
//! The tensor is seen as a matrix: the last dimension across, all others down. Up to [`EXACT`] elements all are read;
//! of a larger one, a few rows of every cell row and a run of every cell column.

use flexmodel_run::{format::Stats, stats::Accumulator};
use serde::Serialize;
use wire::dtype::DType;

/// Rows of cells in a heat map.
pub const ROWS: u64 = 96;
/// Columns of cells in a heat map.
pub const COLS: u64 = 192;
/// Bars of a histogram.
pub const BINS: usize = 64;
/// A tensor of at most this many elements is read in full.
const EXACT: u64 = 1 << 20;
/// Of a larger tensor: rows read of each row of cells.
const SAMPLE_ROWS: u64 = 4;
/// Of a larger tensor: elements read of each cell in each of these rows.
const SAMPLE_RUN: u64 = 16;

/// Reads elements `start..` of the row with these coordinates. The error is a whole sentence.
pub type Read<'a> = dyn Fn(&[u64], u64, &mut [f64]) -> Result<(), String> + 'a;

/// What is drawn of a tensor.
#[derive(Debug, Serialize)]
pub struct Picture {
    elements: u64,
    /// Elements that were read for the picture.
    sampled: u64,
    stats: Stats,
    /// The statistics are those of the sample.
    stats_sampled: bool,
    histogram: Histogram,
    heat: Heat,
}

/// Counts of finite elements in [`BINS`] equal bins from `low` to `high`.
#[derive(Debug, Serialize)]
pub struct Histogram {
    low: f64,
    high: f64,
    bins: Vec<u64>,
}

/// Cells row by row; `null`: nothing finite in it.
#[derive(Debug, Serialize)]
pub struct Heat {
    rows: u64,
    cols: u64,
    /// Rows and columns of the matrix that the cells stand for.
    of_rows: u64,
    of_cols: u64,
    /// Mean of each cell.
    mean: Vec<Option<f32>>,
    /// Element of largest magnitude of each cell, with its sign; empty if every cell is one element.
    peak: Vec<Option<f32>>,
    /// Cells that hold a not-a-number or infinite element.
    bad: Vec<u32>,
}

/// Draws the tensor of this shape. `known`: the statistics of all of it.
pub fn draw(shape: &[u64], read: &Read<'_>, known: Option<Stats>) -> Result<Picture, String> {
    // A zero may stand after numbers whose product is too large.
    let elements = if shape.contains(&0) { 0 } else { shape.iter().product::<u64>() };
    let of_cols = shape.last().copied().unwrap_or(1);
    let of_rows = if elements == 0 { 0 } else { elements / of_cols };
    let (rows, cols) = if elements == 0 { (0, 0) } else { (of_rows.min(ROWS), of_cols.min(COLS)) };
    let exact = elements <= EXACT;
    let one_each = rows == of_rows && cols == of_cols;
    let leading = &shape[..shape.len().saturating_sub(1)];
    let mut sample = Vec::new();
    let mut heat = Heat { rows, cols, of_rows, of_cols, mean: Vec::new(), peak: Vec::new(), bad: Vec::new() };
    let mut coordinates = vec![0; leading.len()];
    for r in 0..rows {
        let (top, bottom) = share(r, rows, of_rows);
        let step = if exact { 1 } else { (bottom - top).div_ceil(SAMPLE_ROWS) };
        let mut cells = vec![Cell::default(); cols as usize];
        for row in (top..bottom).step_by(step as usize) {
            unravel(row, leading, &mut coordinates);
            for (c, cell) in cells.iter_mut().enumerate() {
                let (left, right) = share(c as u64, cols, of_cols);
                let run = if exact { right - left } else { (right - left).min(SAMPLE_RUN) };
                // From the middle of a long run.
                let start = left + (right - left - run) / 2;
                let old = sample.len();
                sample.resize(old + run as usize, 0.0);
                read(&coordinates, start, &mut sample[old..])?;
                sample[old..].iter().for_each(|&x| cell.take(x));
            }
        }
        for cell in cells {
            if cell.bad {
                heat.bad.push(heat.mean.len() as u32);
            }
            heat.mean.push((cell.count > 0).then_some((cell.sum / cell.count as f64) as f32));
            if !one_each {
                heat.peak.push((cell.count > 0).then_some(cell.peak as f32));
            }
        }
    }
    let sampled = sample.len() as u64;
    let known = known.filter(|_| sampled != elements);
    Ok(Picture {
        elements,
        sampled,
        stats_sampled: sampled != elements && known.is_none(),
        stats: known.unwrap_or_else(|| measure(&sample)),
        histogram: histogram(&sample),
        heat,
    })
}

/// The part of `0..whole` that piece `i` of `pieces` covers.
fn share(i: u64, pieces: u64, whole: u64) -> (u64, u64) {
    let cut = |i: u64| (u128::from(i) * u128::from(whole) / u128::from(pieces)) as u64;
    (cut(i), cut(i + 1))
}

fn unravel(mut row: u64, leading: &[u64], out: &mut [u64]) {
    for (at, dim) in out.iter_mut().zip(leading).rev() {
        *at = row % dim;
        row /= dim;
    }
}

#[derive(Clone, Default)]
struct Cell {
    count: u64,
    sum: f64,
    peak: f64,
    bad: bool,
}

impl Cell {
    fn take(&mut self, x: f64) {
        if !x.is_finite() {
            self.bad = true;
            return;
        }
        if self.count == 0 || x.abs() > self.peak.abs() {
            self.peak = x;
        }
        self.count += 1;
        self.sum += x;
    }
}

fn histogram(sample: &[f64]) -> Histogram {
    let finite = || sample.iter().copied().filter(|x| x.is_finite());
    let (low, high) = finite().fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), x| (l.min(x), h.max(x)));
    if low > high {
        return Histogram { low: 0.0, high: 0.0, bins: Vec::new() };
    }
    let mut bins = vec![0u64; BINS];
    // Halved, so that the width of the whole range of float64 is still a number.
    let width = high / 2.0 - low / 2.0;
    for x in finite() {
        let at = if width > 0.0 { (x / 2.0 - low / 2.0) / width * BINS as f64 } else { BINS as f64 / 2.0 };
        bins[(at as usize).min(BINS - 1)] += 1;
    }
    Histogram { low, high, bins }
}

/// Statistics of what was read.
fn measure(sample: &[f64]) -> Stats {
    let mut all = Accumulator::new(DType::Float64);
    for chunk in sample.chunks(4096) {
        let bytes: Vec<u8> = chunk.iter().flat_map(|x| x.to_le_bytes()).collect();
        all.update(&bytes);
    }
    all.stats()
}

#[cfg(test)]
mod tests;
