//! Arithmetic on raw elements: sums of addends, and the small floating types that this needs to be written in.

use wire::dtype::DType;

use super::shards::ReadError;
use crate::stats;

/// Elements that are summed at a time, so that a sum takes no memory but its own.
const CHUNK: usize = 1 << 14;

/// Whether tensors of this type can be added up.
pub fn has_sum(dtype: DType) -> bool {
    !matches!(dtype, DType::Bool | DType::Float8E8M0Fnu)
}

/// The sum of tensors of one type and length: real and complex in float64, integers wrapping, then back to the type.
pub fn sum(dtype: DType, addends: &[&[u8]]) -> Result<Vec<u8>, ReadError> {
    let mut out = vec![0; addends.first().map_or(0, |first| first.len())];
    sum_into(dtype, addends, &mut out)?;
    Ok(out)
}

/// As [`sum`], into memory of the same length.
pub fn sum_into(dtype: DType, addends: &[&[u8]], out: &mut [u8]) -> Result<(), ReadError> {
    if addends.iter().any(|addend| addend.len() != out.len()) {
        return Err(ReadError::Layout("addends differ in length".into()));
    }
    if !has_sum(dtype) {
        return Err(ReadError::NoSum(dtype));
    }
    if !dtype.is_float() && !dtype.is_complex() {
        sum_integers(dtype.size(), addends, out);
        return Ok(());
    }
    let real = component(dtype);
    let step = CHUNK * real.size();
    let (mut total, mut bytes) = (Vec::with_capacity(CHUNK), Vec::with_capacity(step));
    for (n, to) in out.chunks_mut(step).enumerate() {
        total.clear();
        total.resize(to.len() / real.size(), 0.0f64);
        for addend in addends {
            let elements = addend[n * step..][..to.len()].chunks_exact(real.size());
            total.iter_mut().zip(elements).for_each(|(sum, x)| *sum += stats::to_f64(real, x));
        }
        bytes.clear();
        total.iter().for_each(|&x| encode(real, x, &mut bytes));
        to.iter_mut().zip(&bytes).for_each(|(to, from)| *to = *from);
    }
    Ok(())
}

/// The real type that a complex one has two of; a real type itself.
pub fn component(dtype: DType) -> DType {
    match dtype {
        DType::Complex128 => DType::Float64,
        DType::Complex64 => DType::Float32,
        DType::Complex32 => DType::Float16,
        other => other,
    }
}

/// Two's complement addition is the same for both signs, byte by byte with a carry.
fn sum_integers(size: usize, addends: &[&[u8]], out: &mut [u8]) {
    out.fill(0);
    for addend in addends {
        for (a, b) in out.chunks_exact_mut(size).zip(addend.chunks_exact(size)) {
            let mut carry = 0u16;
            for (x, &y) in a.iter_mut().zip(b) {
                let sum = u16::from(*x) + u16::from(y) + carry;
                *x = sum as u8;
                carry = sum >> 8;
            }
        }
    }
}

/// Appends `x` as a real floating `dtype`, rounded to nearest, ties to even.
pub fn encode(dtype: DType, x: f64, out: &mut Vec<u8>) {
    match dtype {
        DType::Float64 => out.extend_from_slice(&x.to_le_bytes()),
        DType::Float32 => out.extend_from_slice(&(x as f32).to_le_bytes()),
        DType::Float16 => out.extend_from_slice(&(small(x, 5, 10, 15, Top::Infinite) as u16).to_le_bytes()),
        DType::BFloat16 => out.extend_from_slice(&(small(x, 8, 7, 127, Top::Infinite) as u16).to_le_bytes()),
        DType::Float8E5M2 => out.push(small(x, 5, 2, 15, Top::Infinite) as u8),
        DType::Float8E4M3Fn => out.push(small(x, 4, 3, 7, Top::Finite) as u8),
        DType::Float8E5M2Fnuz => out.push(small(x, 5, 2, 16, Top::FiniteUnsigned) as u8),
        DType::Float8E4M3Fnuz => out.push(small(x, 4, 3, 8, Top::FiniteUnsigned) as u8),
        // Neither sums nor pads are of another type.
        _ => out.extend(std::iter::repeat_n(0, dtype.size())),
    }
}

/// What the largest exponent of a small floating type means.
#[derive(Clone, Copy, PartialEq)]
enum Top {
    /// Infinity and NaN, as IEEE 754 has it.
    Infinite,
    /// Numbers, all-ones being the NaN (`fn`).
    Finite,
    /// Numbers only; negative zero is the NaN (`fnuz`).
    FiniteUnsigned,
}

fn small(x: f64, exponent_bits: u32, mantissa_bits: u32, bias: i32, top: Top) -> u32 {
    let sign = u32::from(x.is_sign_negative()) << (exponent_bits + mantissa_bits);
    let ones = (1u32 << (exponent_bits + mantissa_bits)) - 1;
    let infinity = ((1u32 << exponent_bits) - 1) << mantissa_bits;
    let not_a_number = match top {
        Top::Infinite => infinity | 1 << (mantissa_bits - 1),
        Top::Finite => ones,
        Top::FiniteUnsigned => return small_unsigned(x, exponent_bits, mantissa_bits, bias),
    };
    if x.is_nan() {
        return not_a_number;
    }
    let bits = magnitude(x.abs(), mantissa_bits, bias);
    match top {
        Top::Infinite if bits >= u64::from(infinity) => sign | infinity,
        Top::Finite if bits >= u64::from(ones) => sign | ones,
        _ => sign | bits as u32,
    }
}

fn small_unsigned(x: f64, exponent_bits: u32, mantissa_bits: u32, bias: i32) -> u32 {
    let sign = 1u32 << (exponent_bits + mantissa_bits);
    let bits = magnitude(x.abs(), mantissa_bits, bias);
    if x.is_nan() || bits >= u64::from(sign) {
        sign
    } else if bits == 0 || x > 0.0 {
        bits as u32
    } else {
        sign | bits as u32
    }
}

/// Exponent and mantissa of `a >= 0`, as if the exponent had no upper end.
fn magnitude(a: f64, mantissa_bits: u32, bias: i32) -> u64 {
    if a.is_infinite() || a.is_nan() {
        return u64::MAX;
    }
    if a == 0.0 {
        return 0;
    }
    // A float64 too small to be normal is far below every type here: it counts as the smallest exponent.
    let exponent = (((a.to_bits() >> 52) & 0x7ff) as i32 - 1023).max(1 - bias);
    let units = (a / 2f64.powi(exponent) * 2f64.powi(mantissa_bits as i32)).round_ties_even() as u64;
    let hidden = 1u64 << mantissa_bits;
    if units < hidden { units } else { (((exponent + bias) as u64) << mantissa_bits) + (units - hidden) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: [DType; 6] = [
        DType::Float16,
        DType::BFloat16,
        DType::Float8E5M2,
        DType::Float8E4M3Fn,
        DType::Float8E5M2Fnuz,
        DType::Float8E4M3Fnuz,
    ];

    #[test]
    fn every_finite_small_number_survives_decoding_and_encoding() {
        for dtype in SMALL {
            for bits in 0..(1u32 << (8 * dtype.size())) {
                let bytes = &bits.to_le_bytes()[..dtype.size()];
                let x = stats::to_f64(dtype, bytes);
                if x.is_finite() {
                    let mut out = Vec::new();
                    encode(dtype, x, &mut out);
                    assert_eq!(out, bytes, "{} {bits:#x} is {x}", dtype.name());
                }
            }
        }
    }

    #[test]
    fn rounding_goes_to_even_and_over_the_top() {
        let one = |dtype, x| {
            let mut out = Vec::new();
            encode(dtype, x, &mut out);
            stats::to_f64(dtype, &out)
        };
        assert_eq!(one(DType::BFloat16, 1.0 + 1.0 / 256.0), 1.0);
        assert_eq!(one(DType::BFloat16, 1.0 + 3.0 / 256.0), 1.0 + 2.0 / 128.0);
        assert_eq!(one(DType::Float16, 1e6), f64::INFINITY);
        assert_eq!(one(DType::Float8E4M3Fn, 448.0), 448.0);
        assert!(one(DType::Float8E4M3Fn, 1e6).is_nan());
        assert!(one(DType::Float8E4M3Fnuz, f64::NAN).is_nan());
        assert_eq!(one(DType::Float16, 2f64.powi(-25)), 0.0);
        assert_eq!(one(DType::Float16, 2f64.powi(-24)), 2f64.powi(-24));
    }

    #[test]
    fn integers_wrap() {
        let a = [(-1i32).to_le_bytes(), i32::MAX.to_le_bytes()].concat();
        let b = [2i32.to_le_bytes(), 1i32.to_le_bytes()].concat();
        assert_eq!(sum(DType::Int32, &[&a, &b]).unwrap(), [1i32.to_le_bytes(), i32::MIN.to_le_bytes()].concat());
    }
}
