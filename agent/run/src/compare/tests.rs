use super::*;

fn side(bytes: &[u8]) -> Side<'_> {
    Side { bytes, divisor: 1.0 }
}

const ANY: Tolerance = Tolerance { rtol: 0.1, atol: 0.5 };

fn f32s(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|x| x.to_le_bytes()).collect()
}

fn of_f32(a: &[f32], b: &[f32], tolerance: Tolerance) -> Difference {
    compare(DType::Float32, side(&f32s(a)), side(&f32s(b)), tolerance)
}

#[test]
fn close_is_what_absolute_and_relative_tolerance_allow_together() {
    let found = of_f32(&[1.5, 10.0, 21.0], &[1.0, 11.0, 20.0], ANY);
    assert_eq!((found.outside, found.max_abs, found.max_rel), (0, 1.0, 0.5));
    // 0.5 of the 0.6 that are allowed.
    assert_eq!(found.worst.index, 0);
    let found = of_f32(&[1.0, 10.0, 24.0], &[1.0, 10.0, 20.0], ANY);
    assert_eq!((found.outside, found.max_abs, found.max_rel, found.worst.index), (1, 4.0, 0.2, 2));
    assert_eq!(found.worst.excess, 4.0 / 2.5);
}

#[test]
fn an_element_on_the_edge_is_close() {
    let edge = Tolerance { rtol: 0.0, atol: 1.0 };
    assert_eq!(of_f32(&[3.0], &[2.0], edge).outside, 0);
    assert_eq!(of_f32(&[3.0000002], &[2.0], edge).outside, 1);
}

#[test]
fn not_a_number_and_infinity_are_equal_to_themselves_alone() {
    let (inf, nan) = (f32::INFINITY, f32::NAN);
    let wide = Tolerance { rtol: 1.0, atol: 1e30 };
    assert_eq!(of_f32(&[nan, inf, -inf], &[-nan, inf, -inf], EQUAL).max_abs, 0.0);
    for (a, b) in [(nan, 1.0), (1.0, nan), (inf, 1.0), (1.0, inf), (inf, -inf), (nan, inf), (inf, nan)] {
        let found = of_f32(&[0.0, a], &[0.0, b], wide);
        assert_eq!((found.outside, found.max_abs, found.max_rel), (1, f64::INFINITY, f64::INFINITY), "{a} {b}");
        assert_eq!(found.worst.index, 1, "{a} {b}");
    }
}

#[test]
fn a_reference_of_zero_has_no_relative_error() {
    let found = of_f32(&[1.0, 2.0], &[0.0, 1.0], ANY);
    assert_eq!((found.max_abs, found.max_rel, found.outside), (1.0, 1.0, 2));
}

#[test]
fn the_worst_element_is_found_in_any_block() {
    for at in [0, BLOCK - 1, BLOCK, 5 * BLOCK + 7] {
        let mut a = vec![1.0f32; 5 * BLOCK + 8];
        let b = a.clone();
        a[at] += 1.0;
        a[3] += 0.25;
        a[BLOCK + 3] += 0.25;
        let found = of_f32(&a, &b, Tolerance { rtol: 0.0, atol: 0.5 });
        assert_eq!((found.worst.index, found.outside), (at, 1));
    }
}

#[test]
fn where_nothing_is_allowed_the_largest_error_is_worst() {
    let found = of_f32(&[1.0, 3.0, 2.0], &[0.0, 0.0, 0.0], EQUAL);
    assert_eq!((found.worst.index, found.outside), (1, 3));
}

#[test]
fn a_gradient_is_divided_on_its_own_side() {
    let run = Side { bytes: &f32s(&[2.0, 4.0, 6.0]), divisor: 2.0 };
    let found = compare(DType::Float32, run, side(&f32s(&[1.0, 2.0, 3.5])), ANY);
    assert_eq!((found.max_abs, found.worst.index), (0.5, 2));
    assert_eq!(run.text(DType::Float32, 2), "3");
    // Equal bytes are not equal values where divisors differ.
    let found = compare(DType::Float32, run, side(run.bytes), ANY);
    assert_eq!(found.max_abs, 3.0);
}

#[test]
fn small_tensors_have_smaller_tolerances() {
    let table = Tolerance::of(DType::Float32);
    let gradient = f32s(&[1e-6, -4e-6, f32::NAN, f32::INFINITY]);
    let most = largest(DType::Float32, Side { bytes: &gradient, divisor: 2.0 });
    assert_eq!(most, f64::from(4e-6f32) / 2.0);
    assert_eq!(table.at(most), Tolerance { rtol: 1.3e-6, atol: 1e-5 * most });
    assert_eq!(table.at(3.0), table);
    assert_eq!(largest(DType::UInt8, side(&[3, 200, 7])), 200.0);
    assert_eq!(largest(DType::Float64, side(&[])), 0.0);
}

#[test]
fn integers_of_64_bits_are_subtracted_exactly() {
    let big = 1i64 << 60;
    let found =
        compare(DType::Int64, side(&big.to_le_bytes()), side(&(big - 1).to_le_bytes()), Tolerance::of(DType::Int64));
    assert_eq!((found.max_abs, found.outside), (1.0, 1));
    let (a, b) = (i64::MAX.to_le_bytes(), i64::MIN.to_le_bytes());
    assert_eq!(compare(DType::Int64, side(&a), side(&b), ANY).max_abs, u64::MAX as f64);
    let found = compare(DType::UInt64, side(&u64::MAX.to_le_bytes()), side(&(u64::MAX - 2).to_le_bytes()), ANY);
    assert_eq!(found.max_abs, 2.0);
}

#[test]
fn a_complex_error_is_a_distance_in_the_plane() {
    let a: Vec<u8> = [3.0f64, 4.0].iter().flat_map(|x| x.to_le_bytes()).collect();
    let found = compare(DType::Complex128, side(&a), side(&[0; 16]), ANY);
    assert_eq!((found.max_abs, found.outside), (5.0, 1));
    let nan = [f32s(&[f32::NAN, 1.0]), f32s(&[2.0, f32::NAN])].concat();
    let other = [f32s(&[5.0, f32::NAN]), f32s(&[2.0, 0.0])].concat();
    let found = compare(DType::Complex64, side(&nan), side(&other), ANY);
    assert_eq!((found.outside, found.worst.index), (1, 1));
}

/// A number other than zero and its double, in every type; of booleans, false and true.
fn small_and_large(dtype: DType) -> [Vec<u8>; 2] {
    let of = |n: u64| n.to_le_bytes()[..dtype.size().min(8)].to_vec();
    match dtype {
        DType::Float64 => [1f64.to_le_bytes().to_vec(), 2f64.to_le_bytes().to_vec()],
        DType::Float32 => [f32s(&[1.0]), f32s(&[2.0])],
        DType::Float16 => [of(0x3c00), of(0x4000)],
        DType::BFloat16 => [of(0x3f80), of(0x4000)],
        DType::Float8E4M3Fn => [of(0x38), of(0x40)],
        DType::Float8E5M2 => [of(0x3c), of(0x40)],
        DType::Float8E4M3Fnuz => [of(0x40), of(0x48)],
        DType::Float8E5M2Fnuz => [of(0x40), of(0x44)],
        DType::Float8E8M0Fnu => [of(127), of(128)],
        DType::Bool => [of(0), of(1)],
        DType::Complex128 => [0f64, 1.0].map(|x| [2f64.to_le_bytes(), x.to_le_bytes()].concat()),
        DType::Complex64 => [0f32, 1.0].map(|x| f32s(&[2.0, x])),
        DType::Complex32 => [0u16, 0x3c00].map(|x| [0x4000u16.to_le_bytes(), x.to_le_bytes()].concat()),
        _ => [of(1), of(2)],
    }
}

#[test]
fn every_type_has_an_error_of_one_between_one_and_two() {
    for &dtype in DType::ALL {
        let [small, large] = small_and_large(dtype);
        let found = compare(dtype, side(&large), side(&small), Tolerance::of(dtype));
        assert_eq!((found.max_abs, found.outside), (1.0, 1), "{}", dtype.name());
        assert_eq!(compare(dtype, side(&small), side(&large), Tolerance::of(dtype)).max_abs, 1.0, "{}", dtype.name());
        let text = side(&large).text(dtype, 0);
        let shown = match dtype {
            DType::Bool => "true",
            _ if dtype.is_complex() => "2+1j",
            _ => "2",
        };
        assert_eq!(text, shown, "{}", dtype.name());
    }
    assert_eq!(side(&(-3i16).to_le_bytes()).text(DType::Int16, 0), "-3");
    assert_eq!(side(&u64::MAX.to_le_bytes()).text(DType::UInt64, 0), u64::MAX.to_string());
}
