//! Elements of every type as `f32` where that is exact, else as `f64`.

use std::sync::LazyLock;

use wire::dtype::DType;

/// Converts little-endian elements; both slices hold the same number of them.
pub enum Wide {
    /// Exact in 24 bits of mantissa.
    F32(fn(&[u8], &mut [f32])),
    /// Everything else. Complex elements become their magnitude.
    F64(fn(&[u8], &mut [f64])),
}

/// How elements of `dtype` are widened.
pub fn wide(dtype: DType) -> Wide {
    match dtype {
        DType::Float32 => Wide::F32(|b, out| each(b, out, f32::from_le_bytes)),
        DType::BFloat16 => Wide::F32(|b, out| each(b, out, |x| f32::from_bits(u32::from(u16::from_le_bytes(x)) << 16))),
        DType::Float16 => Wide::F32(|b, out| each(b, out, half)),
        DType::Int16 => Wide::F32(|b, out| each(b, out, |x| f32::from(i16::from_le_bytes(x)))),
        DType::UInt16 => Wide::F32(|b, out| each(b, out, |x| f32::from(u16::from_le_bytes(x)))),
        DType::Int8 => Wide::F32(|b, out| each(b, out, |x| f32::from(i8::from_le_bytes(x)))),
        DType::UInt8 => Wide::F32(|b, out| each(b, out, |[x]: [u8; 1]| f32::from(x))),
        DType::Bool => Wide::F32(|b, out| each(b, out, |[x]: [u8; 1]| f32::from(u8::from(x != 0)))),
        DType::Float8E4M3Fn => Wide::F32(|b, out| table(b, out, &E4M3FN)),
        DType::Float8E5M2 => Wide::F32(|b, out| table(b, out, &E5M2)),
        DType::Float8E4M3Fnuz => Wide::F32(|b, out| table(b, out, &E4M3FNUZ)),
        DType::Float8E5M2Fnuz => Wide::F32(|b, out| table(b, out, &E5M2FNUZ)),
        DType::Float8E8M0Fnu => Wide::F32(|b, out| table(b, out, &E8M0)),
        DType::Float64 => Wide::F64(|b, out| each(b, out, f64::from_le_bytes)),
        DType::Int32 => Wide::F64(|b, out| each(b, out, |x| f64::from(i32::from_le_bytes(x)))),
        DType::UInt32 => Wide::F64(|b, out| each(b, out, |x| f64::from(u32::from_le_bytes(x)))),
        DType::Int64 => Wide::F64(|b, out| each(b, out, |x| i64::from_le_bytes(x) as f64)),
        DType::UInt64 => Wide::F64(|b, out| each(b, out, |x| u64::from_le_bytes(x) as f64)),
        DType::Complex32 => Wide::F64(|b, out| {
            each(b, out, |[a, b, c, d]: [u8; 4]| magnitude(f64::from(half([a, b])), f64::from(half([c, d]))));
        }),
        DType::Complex64 => Wide::F64(|b, out| {
            each(b, out, |x: [u8; 8]| {
                let (re, im) = x.split_at(4);
                magnitude(to_f64(DType::Float32, re), to_f64(DType::Float32, im))
            });
        }),
        DType::Complex128 => Wide::F64(|b, out| {
            each(b, out, |x: [u8; 16]| {
                let (re, im) = x.split_at(8);
                magnitude(to_f64(DType::Float64, re), to_f64(DType::Float64, im))
            });
        }),
    }
}

/// Real elements as numbers (64-bit integers rounded); both slices hold the same number of them.
pub fn widen(dtype: DType, bytes: &[u8], out: &mut [f64]) {
    match wide(dtype) {
        Wide::F64(fill) => fill(bytes, out),
        Wide::F32(fill) => {
            let mut narrow = [0f32; 256];
            for (bytes, out) in bytes.chunks(narrow.len() * dtype.size()).zip(out.chunks_mut(narrow.len())) {
                fill(bytes, &mut narrow);
                for (out, x) in out.iter_mut().zip(narrow) {
                    *out = f64::from(x);
                }
            }
        }
    }
}

/// One element as a number; a complex one's magnitude; not-a-number if `bytes` is not one element long.
pub fn to_f64(dtype: DType, bytes: &[u8]) -> f64 {
    if bytes.len() != dtype.size() {
        return f64::NAN;
    }
    match wide(dtype) {
        Wide::F32(fill) => {
            let mut one = [0f32];
            fill(bytes, &mut one);
            f64::from(one[0])
        }
        Wide::F64(fill) => {
            let mut one = [0f64];
            fill(bytes, &mut one);
            one[0]
        }
    }
}

#[inline(always)]
fn each<const N: usize, T>(bytes: &[u8], out: &mut [T], convert: impl Fn([u8; N]) -> T) {
    let (elements, _) = bytes.as_chunks::<N>();
    for (element, out) in elements.iter().zip(out) {
        *out = convert(*element);
    }
}

fn table(bytes: &[u8], out: &mut [f32], values: &[f32; 256]) {
    each(bytes, out, |[x]: [u8; 1]| values[usize::from(x)]);
}

/// IEEE half precision, without a branch.
#[inline(always)]
fn half(bytes: [u8; 2]) -> f32 {
    let h = u32::from(u16::from_le_bytes(bytes));
    let magnitude = (h & 0x7fff) << 13;
    // Rebias the exponent by a multiplication, which makes subnormals normal too.
    let value = f32::from_bits(magnitude) * f32::from_bits(0x7780_0000);
    let special = if magnitude >= 0x7c00 << 13 { 0x7f80_0000 } else { 0 };
    f32::from_bits(value.to_bits() | special | (h & 0x8000) << 16)
}

/// Not a number as soon as either half is.
fn magnitude(re: f64, im: f64) -> f64 {
    if re.is_nan() || im.is_nan() { f64::NAN } else { re.hypot(im) }
}

static E4M3FN: LazyLock<[f32; 256]> =
    LazyLock::new(|| eight_bits(|x| if x & 0x7f == 0x7f { f32::NAN } else { scaled(x, 3, 7) }));
static E5M2: LazyLock<[f32; 256]> = LazyLock::new(|| {
    eight_bits(|x| match x & 0x7f {
        0x7c if x & 0x80 == 0 => f32::INFINITY,
        0x7c => f32::NEG_INFINITY,
        0x7d.. => f32::NAN,
        _ => scaled(x, 2, 15),
    })
});
static E4M3FNUZ: LazyLock<[f32; 256]> =
    LazyLock::new(|| eight_bits(|x| if x == 0x80 { f32::NAN } else { scaled(x, 3, 8) }));
static E5M2FNUZ: LazyLock<[f32; 256]> =
    LazyLock::new(|| eight_bits(|x| if x == 0x80 { f32::NAN } else { scaled(x, 2, 16) }));
static E8M0: LazyLock<[f32; 256]> =
    LazyLock::new(|| eight_bits(|x| if x == 0xff { f32::NAN } else { 2f32.powi(i32::from(x) - 127) }));

fn eight_bits(value: impl Fn(u8) -> f32) -> [f32; 256] {
    std::array::from_fn(|x| value(x as u8))
}

/// Sign, exponent and `mantissa` bits of mantissa, all of them finite numbers.
fn scaled(x: u8, mantissa: i32, bias: i32) -> f32 {
    let exponent = i32::from((x & 0x7f) >> mantissa);
    let fraction = f32::from(x & ((1 << mantissa) - 1)) / f32::from(1u8 << mantissa);
    let magnitude = match exponent {
        0 => fraction * 2f32.powi(1 - bias),
        _ => (1.0 + fraction) * 2f32.powi(exponent - bias),
    };
    if x & 0x80 == 0 { magnitude } else { -magnitude }
}
