//! Against a plain loop in double precision.

use proptest::prelude::*;

use super::*;

fn plain(values: &[f64]) -> Stats {
    let finite: Vec<f64> = values.iter().copied().filter(|x| x.is_finite()).collect();
    let n = finite.len() as f64;
    let mean = finite.iter().sum::<f64>() / n;
    let some = |x: f64| (!finite.is_empty()).then_some(x);
    Stats {
        count: values.len() as u64,
        mean: some(mean),
        std: some((finite.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / n).sqrt()),
        l2: some(finite.iter().map(|x| x * x).sum::<f64>().sqrt()),
        absmax: some(finite.iter().fold(0.0, |a, x| x.abs().max(a))),
        min: some(finite.iter().copied().fold(f64::INFINITY, f64::min)),
        max: some(finite.iter().copied().fold(f64::NEG_INFINITY, f64::max)),
        nan: values.iter().filter(|x| x.is_nan()).count() as u64,
        inf: values.iter().filter(|x| x.is_infinite()).count() as u64,
        zero: values.iter().filter(|&&x| x == 0.0).count() as u64,
    }
}

#[track_caller]
fn assert_close(got: &Stats, want: &Stats) {
    let close = |name: &str, a: Option<f64>, b: Option<f64>| match (a, b) {
        (Some(a), Some(b)) => {
            let scale = want.absmax.unwrap_or(0.0).max(b.abs()).max(1e-300);
            assert!((a - b).abs() <= scale * 1e-9, "{name}: {a} is not {b}\n{got:?}\n{want:?}");
        }
        _ => assert_eq!(a, b, "{name}"),
    };
    close("mean", got.mean, want.mean);
    close("std", got.std, want.std);
    close("l2", got.l2, want.l2);
    assert_eq!((got.absmax, got.min, got.max), (want.absmax, want.min, want.max));
    assert_eq!((got.count, got.nan, got.inf, got.zero), (want.count, want.nan, want.inf, want.zero));
}

fn f32_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|x| x.to_le_bytes()).collect()
}

#[test]
fn no_elements_have_no_moments() {
    let stats = compute(DType::Float32, &[]).unwrap();
    assert_eq!(stats, Stats::default());
}

#[test]
fn elements_that_are_not_finite_are_counted_apart() {
    let stats = compute(DType::Float32, &f32_bytes(&[1.0, f32::NAN, f32::NEG_INFINITY, -3.0, 0.0, -0.0])).unwrap();
    assert_eq!((stats.count, stats.nan, stats.inf, stats.zero), (6, 1, 1, 2));
    assert_eq!((stats.mean, stats.min, stats.max, stats.absmax), (Some(-0.5), Some(-3.0), Some(1.0), Some(3.0)));
}

#[test]
fn a_large_mean_does_not_drown_a_small_deviation() {
    let values: Vec<f64> = (0..100_000).map(|n| 1e9 + f64::from(n % 2) * 1e-3).collect();
    let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
    let std = compute(DType::Float64, &bytes).unwrap().std.unwrap();
    assert!((std - 5e-4).abs() < 5e-7, "{std}");
}

#[test]
fn every_type_widens_to_the_number_it_means() {
    for (dtype, bytes, value) in [
        (DType::BFloat16, vec![0x80, 0xbf], -1.0),
        (DType::Float16, vec![0x00, 0x3c], 1.0),
        (DType::Float16, vec![0x01, 0x00], 2f64.powi(-24)),
        (DType::Float16, vec![0x00, 0xfc], f64::NEG_INFINITY),
        (DType::Float8E4M3Fn, vec![0x7e], 448.0),
        (DType::Float8E4M3Fn, vec![0x01], 2f64.powi(-9)),
        (DType::Float8E5M2, vec![0x7b], 57344.0),
        (DType::Float8E5M2, vec![0xfc], f64::NEG_INFINITY),
        (DType::Float8E4M3Fnuz, vec![0x7f], 240.0),
        (DType::Float8E5M2Fnuz, vec![0x7f], 57344.0),
        (DType::Float8E8M0Fnu, vec![0], 2f64.powi(-127)),
        (DType::Float8E8M0Fnu, vec![128], 2.0),
        (DType::Int64, (-5i64).to_le_bytes().to_vec(), -5.0),
        (DType::UInt32, u32::MAX.to_le_bytes().to_vec(), 4294967295.0),
        (DType::Int8, vec![0x80], -128.0),
        (DType::Bool, vec![7], 1.0),
        (DType::Complex64, [3f32, -4.0].iter().flat_map(|x| x.to_le_bytes()).collect(), 5.0),
        (DType::Complex32, vec![0x00, 0x42, 0x00, 0x44], 5.0),
    ] {
        assert_eq!(to_f64(dtype, &bytes), value, "{dtype:?} {bytes:02x?}");
    }
    assert!(to_f64(DType::Float8E4M3Fn, &[0xff]).is_nan());
    assert!(to_f64(DType::Float8E4M3Fnuz, &[0x80]).is_nan());
    assert!(to_f64(DType::Float16, &[0x01, 0x7c]).is_nan());
}

#[test]
fn every_type_has_statistics_of_all_its_elements() {
    let bytes: Vec<u8> = (0..16 * 5000u32).map(|n| (n.wrapping_mul(2654435761) >> 24) as u8).collect();
    for &dtype in DType::ALL {
        let values: Vec<f64> = bytes.chunks(dtype.size()).map(|element| to_f64(dtype, element)).collect();
        let got = compute(dtype, &bytes).unwrap();
        assert_eq!(got.count, values.len() as u64, "{dtype:?}");
        if values.iter().all(|x| !x.is_finite() || x.abs() < 1e100) {
            assert_close(&got, &plain(&values));
        }
    }
}

#[test]
fn squares_past_the_range_of_f64_are_null_and_the_rest_is_known() {
    let bytes: Vec<u8> = [1e300f64, -1e300].iter().flat_map(|x| x.to_le_bytes()).collect();
    let stats = compute(DType::Float64, &bytes).unwrap();
    assert_eq!((stats.l2, stats.absmax, stats.count), (None, Some(1e300), 2));
}

proptest! {
    #[test]
    fn pieces_add_up_to_the_whole(
        values in proptest::collection::vec(-1e4f32..1e4, 0..3000),
        cuts in proptest::collection::vec(any::<prop::sample::Index>(), 0..5),
    ) {
        let bytes = f32_bytes(&values);
        let mut cuts: Vec<usize> = cuts.iter().map(|c| c.index(bytes.len() + 1)).collect();
        cuts.push(bytes.len());
        cuts.sort_unstable();
        let mut pieces = Accumulator::new(DType::Float32);
        let mut from = 0;
        for to in cuts {
            pieces.update(&bytes[from..to]);
            from = to;
        }
        let values: Vec<f64> = values.iter().map(|&x| f64::from(x)).collect();
        assert_close(&pieces.stats(), &plain(&values));
    }

    #[test]
    fn merged_statistics_are_those_of_both(
        a in proptest::collection::vec(-1e4f32..1e4, 0..2000),
        b in proptest::collection::vec(-1e4f32..1e4, 0..2000),
    ) {
        let of = |v: &[f32]| compute(DType::Float32, &f32_bytes(v)).unwrap();
        let both: Vec<f64> = a.iter().chain(&b).map(|&x| f64::from(x)).collect();
        assert_close(&of(&a).merge(&of(&b)), &plain(&both));
    }
}
