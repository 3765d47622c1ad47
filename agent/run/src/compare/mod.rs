//! How far two tensors of one type and shape are apart, element by element in float64.

use wire::dtype::DType;

use crate::{read::number::component, stats};

/// Elements that are widened at a time: small enough for the stack and the first-level cache.
const BLOCK: usize = 256;

/// An element is close if its error is at most `atol + rtol * |reference|`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tolerance {
    /// Relative to the reference's element.
    pub rtol: f64,
    /// Absolute.
    pub atol: f64,
}

/// Nothing is allowed.
pub const EQUAL: Tolerance = Tolerance { rtol: 0.0, atol: 0.0 };

impl Tolerance {
    /// The defaults of `torch.testing.assert_close`, by its table; types that it does not list must be equal.
    pub fn of(dtype: DType) -> Self {
        let (rtol, atol) = match dtype {
            DType::Float16 | DType::Complex32 => (1e-3, 1e-5),
            DType::BFloat16 => (1.6e-2, 1e-5),
            DType::Float32 | DType::Complex64 => (1.3e-6, 1e-5),
            DType::Float64 | DType::Complex128 => (1e-7, 1e-7),
            _ => (0.0, 0.0),
        };
        Self { rtol, atol }
    }

    /// The same for a tensor with this largest magnitude. The table's absolute tolerances are for numbers about one: most
    /// gradients are smaller than these tolerances themselves, and any two of them would be close.
    pub fn at(self, largest: f64) -> Self {
        Self { atol: self.atol * largest.min(1.0), ..self }
    }
}

/// Elements of a tensor, and the number that each is divided by before it is compared.
#[derive(Clone, Copy)]
pub struct Side<'a> {
    /// Little-endian elements.
    pub bytes: &'a [u8],
    /// 1 but for gradients, and those are not integers: integers ignore it.
    pub divisor: f64,
}

impl Side<'_> {
    /// An element as people write it, divided.
    pub fn text(&self, dtype: DType, index: usize) -> String {
        let size = dtype.size();
        let Some(element) = self.bytes.get(index * size..(index + 1) * size) else { return "?".into() };
        let real = component(dtype);
        let one = |bytes: &[u8]| {
            let x = stats::to_f64(real, bytes) / self.divisor;
            // Digits beyond the type's own say nothing.
            if real == DType::Float64 { x.to_string() } else { (x as f32).to_string() }
        };
        if dtype.is_complex() {
            let (re, im) = element.split_at(size / 2);
            let im = one(im);
            let sign = if im.starts_with('-') { "" } else { "+" };
            return format!("{}{sign}{im}j", one(re));
        }
        if dtype.is_float() {
            return one(element);
        }
        match dtype {
            DType::Bool => (element[0] != 0).to_string(),
            DType::UInt64 | DType::UInt32 | DType::UInt16 | DType::UInt8 => unsigned(element).to_string(),
            _ => signed(element).to_string(),
        }
    }
}

fn unsigned(element: &[u8]) -> u64 {
    element.iter().rev().fold(0, |n, &byte| n << 8 | u64::from(byte))
}

fn signed(element: &[u8]) -> i64 {
    let empty = 64 - 8 * element.len() as u32;
    (unsigned(element) << empty).cast_signed() >> empty
}

/// The largest finite magnitude among elements, divided; 0 where there is none.
pub fn largest(dtype: DType, side: Side<'_>) -> f64 {
    let real = component(dtype);
    let mut wide = [0f64; BLOCK];
    let mut largest = 0f64;
    for bytes in side.bytes.chunks(BLOCK * real.size()) {
        let wide = &mut wide[..bytes.len() / real.size()];
        stats::widen(real, bytes, wide);
        largest = wide.iter().fold(largest, |most, x| if x.is_finite() { most.max(x.abs()) } else { most });
    }
    largest / side.divisor
}

/// What was found between two tensors.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Difference {
    /// Elements that are not close.
    pub outside: u64,
    /// Largest absolute error; infinite where one side alone is infinite or not a number.
    pub max_abs: f64,
    /// Largest error relative to the reference, over elements whose reference is not zero.
    pub max_rel: f64,
    /// The element that is furthest outside its tolerance, or nearest to its edge.
    pub worst: Worst,
}

/// An element.
#[derive(Clone, Copy, Debug, Default, PartialEq, PartialOrd)]
pub struct Worst {
    /// Its error over what its tolerance allows; infinite where that is nothing.
    pub excess: f64,
    /// Its error.
    pub error: f64,
    /// Its place among the elements in row-major order.
    pub index: usize,
}

/// Compares elements of `dtype`; both sides have as many of them. Not-a-number equals itself, as infinity does. A complex
/// element's error is the magnitude of the difference. No error is rounded before it is in float64.
pub fn compare(dtype: DType, run: Side<'_>, reference: Side<'_>, tolerance: Tolerance) -> Difference {
    let step = BLOCK * dtype.size();
    let mut found = Difference::default();
    let (mut errors, mut sizes) = ([0f64; BLOCK], [0f64; BLOCK]);
    for (number, (a, b)) in run.bytes.chunks(step).zip(reference.bytes.chunks(step)).enumerate() {
        let count = a.len() / dtype.size();
        let (errors, sizes) = (&mut errors[..count], &mut sizes[..count]);
        let (a, b) = (Side { bytes: a, ..run }, Side { bytes: b, ..reference });
        if a.divisor == b.divisor && a.bytes == b.bytes {
            continue;
        }
        distances(dtype, a, b, errors, sizes);
        found.take(number * BLOCK, errors, sizes, tolerance);
    }
    found
}

impl Difference {
    /// Adds a block that starts at element `first`.
    fn take(&mut self, first: usize, errors: &[f64], sizes: &[f64], tolerance: Tolerance) {
        let (mut outside, mut max_abs, mut max_rel, mut excess) = (0u64, 0f64, 0f64, 0f64);
        let judge = |error: f64, size: f64| {
            let allowed = tolerance.atol + tolerance.rtol * size;
            (allowed, if error == 0.0 { 0.0 } else { error / allowed })
        };
        for (&error, &size) in errors.iter().zip(sizes) {
            let (allowed, over) = judge(error, size);
            outside += u64::from(error > allowed);
            max_abs = max_abs.max(error);
            max_rel = max_rel.max(if size > 0.0 { error / size } else { 0.0 });
            excess = excess.max(over);
        }
        self.outside += outside;
        self.max_abs = self.max_abs.max(max_abs);
        self.max_rel = self.max_rel.max(max_rel);
        // Which element it was is looked up only where the block has a worse one than any before.
        if excess > self.worst.excess || excess == self.worst.excess && max_abs > self.worst.error {
            for (at, (&error, &size)) in errors.iter().zip(sizes).enumerate() {
                let over = judge(error, size).1;
                if (over, error) > (self.worst.excess, self.worst.error) {
                    self.worst = Worst { excess: over, error, index: first + at };
                }
            }
        }
    }
}

/// Errors, and magnitudes of the reference's elements; an error that is infinite has the magnitude 1.
fn distances(dtype: DType, a: Side<'_>, b: Side<'_>, errors: &mut [f64], sizes: &mut [f64]) {
    match dtype {
        DType::Int64 => integers(a.bytes, b.bytes, errors, sizes, |x, y| {
            let (x, y) = (i64::from_le_bytes(x), i64::from_le_bytes(y));
            (x.abs_diff(y), y.unsigned_abs())
        }),
        DType::UInt64 => integers(a.bytes, b.bytes, errors, sizes, |x, y| {
            let (x, y) = (u64::from_le_bytes(x), u64::from_le_bytes(y));
            (x.abs_diff(y), y)
        }),
        _ => floats(dtype, a, b, errors, sizes),
    }
}

/// 64-bit integers have more digits than float64, so they are subtracted as what they are.
fn integers(a: &[u8], b: &[u8], errors: &mut [f64], sizes: &mut [f64], of: impl Fn([u8; 8], [u8; 8]) -> (u64, u64)) {
    for (((x, y), error), size) in a.as_chunks().0.iter().zip(b.as_chunks().0).zip(errors).zip(sizes) {
        let (apart, magnitude) = of(*x, *y);
        (*error, *size) = (apart as f64, magnitude as f64);
    }
}

/// Everything that float64 holds exactly, also 32-bit integers and booleans, which never have another divisor than 1.
fn floats(dtype: DType, a: Side<'_>, b: Side<'_>, errors: &mut [f64], sizes: &mut [f64]) {
    let real = component(dtype);
    let numbers = errors.len() * (dtype.size() / real.size());
    let (mut x, mut y) = ([0f64; 2 * BLOCK], [0f64; 2 * BLOCK]);
    for (side, out) in [(a, &mut x[..numbers]), (b, &mut y[..numbers])] {
        stats::widen(real, side.bytes, out);
        if side.divisor != 1.0 {
            out.iter_mut().for_each(|value| *value /= side.divisor);
        }
    }
    if dtype.is_complex() {
        let pairs = x.as_chunks::<2>().0.iter().zip(y.as_chunks::<2>().0);
        for (((p, q), error), size) in pairs.zip(errors).zip(sizes) {
            let nan = |[re, im]: &[f64; 2]| re.is_nan() || im.is_nan();
            let same = p == q || nan(p) && nan(q);
            (*error, *size) = settle(same, (p[0] - q[0]).hypot(p[1] - q[1]), q[0].hypot(q[1]));
        }
    } else {
        for (((p, q), error), size) in x.iter().zip(&y).zip(errors).zip(sizes) {
            (*error, *size) = settle(p == q || p.is_nan() && q.is_nan(), (p - q).abs(), q.abs());
        }
    }
}

#[inline(always)]
fn settle(same: bool, error: f64, size: f64) -> (f64, f64) {
    // An infinity or not-a-number is on one side, or infinities of two signs or directions are.
    let broken = !error.is_finite();
    match (same, broken) {
        (true, _) => (0.0, 0.0),
        (false, true) => (f64::INFINITY, 1.0),
        (false, false) => (error, size),
    }
}

#[cfg(test)]
mod tests;
