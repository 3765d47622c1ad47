//! Sums over one block of elements, written so that the compiler makes vector code of them.

/// Elements of a block.
pub const BLOCK: usize = 1024;
/// Independent sums.
const LANES: usize = 16;

/// What a block adds up to.
#[derive(Clone, Copy, Debug)]
pub struct Block {
    /// Elements.
    pub count: usize,
    /// What the sums are taken around.
    pub shift: f64,
    /// Of differences from `shift`.
    pub sum: f64,
    /// Of their squares.
    pub squares: f64,
    /// Smallest element.
    pub min: f64,
    /// Largest element.
    pub max: f64,
    /// Elements equal to zero.
    pub zeros: u64,
    /// Whether every element is finite. If not, nothing else in here means anything.
    pub finite: bool,
}

macro_rules! kernel {
    ($name:ident, $body:ident, $avx2:ident, $float:ty, $bits:ty, $magnitude:expr) => {
        /// Sums over a block, around `shift` or, where there is none yet, its own first element.
        pub fn $name(values: &[$float], shift: Option<f64>) -> Block {
            let first = values.first().map_or(0.0, |&x| f64::from(x));
            let shift = shift.unwrap_or(if first.is_finite() { first } else { 0.0 });
            #[cfg(target_arch = "x86_64")]
            if std::is_x86_feature_detected!("avx2") {
                // SAFETY: the processor has AVX2, as just asked.
                return unsafe { $avx2(values, shift) };
            }
            $body(values, shift)
        }

        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2")]
        fn $avx2(values: &[$float], shift: f64) -> Block {
            $body(values, shift)
        }

        #[inline(always)]
        fn $body(values: &[$float], shift: f64) -> Block {
            let mut sum = [0f64; LANES];
            let mut squares = [0f64; LANES];
            let mut min = [<$float>::INFINITY; LANES];
            let mut max = [<$float>::NEG_INFINITY; LANES];
            // Magnitudes in order, as integers: whatever is not finite is at or above infinity's bits.
            let mut top = [0 as $bits; LANES];
            let mut zeros = [0 as $bits; LANES];
            let (whole, rest) = values.as_chunks::<LANES>();
            let mut one = |i: usize, x: $float| {
                let d = f64::from(x) - shift;
                sum[i] += d;
                squares[i] += d * d;
                min[i] = if x < min[i] { x } else { min[i] };
                max[i] = if x > max[i] { x } else { max[i] };
                let bits = (x.to_bits() & $magnitude) as $bits;
                top[i] = if bits > top[i] { bits } else { top[i] };
                zeros[i] += (bits == 0) as $bits;
            };
            for lanes in whole {
                for i in 0..LANES {
                    one(i, lanes[i]);
                }
            }
            for (i, &x) in rest.iter().enumerate() {
                one(i, x);
            }
            Block {
                count: values.len(),
                shift,
                sum: sum.iter().sum(),
                squares: squares.iter().sum(),
                min: min.iter().fold(f64::INFINITY, |a, &b| a.min(f64::from(b))),
                max: max.iter().fold(f64::NEG_INFINITY, |a, &b| a.max(f64::from(b))),
                zeros: zeros.iter().map(|&z| z as u64).sum(),
                finite: top.iter().all(|&t| t < <$float>::INFINITY.to_bits() as $bits),
            }
        }
    };
}

kernel!(f32s, f32s_body, f32s_avx2, f32, i32, 0x7fff_ffff);
kernel!(f64s, f64s_body, f64s_avx2, f64, i64, 0x7fff_ffff_ffff_ffff);
