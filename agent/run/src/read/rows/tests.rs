//! Padding, and what is not padded.

use wire::record::{Axis, Placement};

use super::*;
use crate::{
    read::{AssemblyPlan, Run, fill},
    testing::fixture::*,
};

#[test]
fn a_number_is_an_element_of_every_type_that_has_it() {
    let element = |number, dtype| Pad::new(number, dtype, Side::Left).map(|pad| pad.element(dtype).to_vec()).ok();
    for &dtype in DType::ALL.iter().filter(|&&dtype| dtype != DType::Float8E8M0Fnu) {
        assert_eq!(element(Number::Integer(0), dtype), Some(vec![0; dtype.size()]), "{}", dtype.name());
    }
    assert_eq!(element(Number::Integer(0), DType::Float8E8M0Fnu), None);
    assert_eq!(element(Number::Integer(1), DType::Float8E8M0Fnu), Some(vec![127]));
    assert_eq!(element(Number::Integer(-100), DType::Int64), Some((-100i64).to_le_bytes().to_vec()));
    assert_eq!(element(Number::Real(2.0), DType::UInt8), Some(vec![2]));
    assert_eq!(element(Number::Real(f64::NEG_INFINITY), DType::BFloat16), Some(vec![0x80, 0xff]));
    assert_eq!(element(Number::Complex(1.0, 2.0), DType::Complex64), Some([1f32, 2.0].map(f32::to_le_bytes).concat()));
    assert_eq!(element(Number::Integer(u64::MAX.into()), DType::UInt64), Some(vec![255; 8]));
}

#[test]
fn a_number_that_a_type_lacks_is_refused_by_name() {
    let refusal = |number, dtype| Pad::new(number, dtype, Side::Right).unwrap_err();
    assert_eq!(refusal(Number::Integer(300), DType::UInt8), "300 is no uint8");
    assert_eq!(refusal(Number::Integer(-1), DType::UInt64), "-1 is no uint64");
    assert_eq!(refusal(Number::Integer(2), DType::Bool), "2 is no bool");
    assert_eq!(refusal(Number::Real(0.5), DType::Int32), "0.5 is no int32");
    assert_eq!(refusal(Number::Real(f64::NAN), DType::Int8), "NaN is no int8");
    assert_eq!(refusal(Number::Real(1e6), DType::Float16), "1000000 is no float16");
    assert_eq!(refusal(Number::Real(f64::INFINITY), DType::Float8E4M3Fn), "inf is no float8_e4m3fn");
    assert_eq!(refusal(Number::Complex(1.0, -2.0), DType::Float32), "1-2i is no float32");
}

#[test]
fn a_commands_argument_is_a_number() {
    assert_eq!(Number::parse("-100"), Some(Number::Integer(-100)));
    assert_eq!(Number::parse("-1e9"), Some(Number::Real(-1e9)));
    assert_eq!(Number::parse("-inf"), Some(Number::Real(f64::NEG_INFINITY)));
    assert_eq!(Number::parse("zero"), None);
}

/// The whole of the record of a run, by both executors.
fn padded(run: &Run, pad: &Pad) -> (Vec<u64>, Vec<u8>) {
    let record = &run.records[0];
    let whole = run.padded(record, pad).unwrap();
    let plan = AssemblyPlan::padded(&record.parts, pad).unwrap();
    assert_eq!(&*fill::own(&plan, run.shards()).unwrap(), &*whole.bytes);
    (whole.shape, whole.bytes.to_vec())
}

fn run_of(parts: &[(&[u64], Vec<Axis>, &[u8])]) -> (tempfile::TempDir, Run) {
    let mut f = Fixture::default();
    for (rank, (shape, axes, bytes)) in parts.iter().enumerate() {
        f.part(id("m", 0), DType::UInt8, shape, rank as u32, axes.clone(), bytes);
    }
    let dir = f.finish();
    let run = Run::open(dir.path()).unwrap();
    (dir, run)
}

fn pad(number: i128, side: Side) -> Pad {
    Pad::new(Number::Integer(number), DType::UInt8, side).unwrap()
}

fn mesh(dp: (u32, Placement), tp: (u32, Placement)) -> Vec<Axis> {
    let axis = |name: &str, (index, place)| Axis { name: name.into(), index, size: 2, place, input_digest: None };
    vec![axis("dp", dp), axis("tp", tp)]
}

#[test]
fn rows_of_two_lengths_are_filled_up_on_either_side() {
    let (_dir, run) =
        run_of(&[(&[2, 3], dp(0, 2, shard(0)), &[1, 2, 3, 4, 5, 6]), (&[1, 2], dp(1, 2, shard(0)), &[7, 8])]);
    assert_eq!(padded(&run, &pad(9, Side::Right)), (vec![3, 3], vec![1, 2, 3, 4, 5, 6, 7, 8, 9]));
    assert_eq!(padded(&run, &pad(0, Side::Left)), (vec![3, 3], vec![1, 2, 3, 4, 5, 6, 0, 7, 8]));
    let refused = run.whole(&run.records[0]).unwrap_err().to_string();
    assert!(refused.contains("its own longest ([3, 2..3])") && refused.contains("nested=True"), "{refused}");
    assert_eq!(run.records[0].padded_shape(), Some(vec![3, 3]));
}

#[test]
fn rows_that_differ_in_several_dimensions_are_filled_up_in_all() {
    let (_dir, run) = run_of(&[(&[1, 1, 2], dp(0, 2, shard(0)), &[1, 2]), (&[1, 2, 1], dp(1, 2, shard(0)), &[3, 4])]);
    assert_eq!(padded(&run, &pad(9, Side::Right)), (vec![2, 2, 2], vec![1, 2, 9, 9, 3, 9, 4, 9]));
    assert_eq!(padded(&run, &pad(9, Side::Left)), (vec![2, 2, 2], vec![9, 9, 1, 2, 9, 3, 9, 4]));
    let filled = filled(&run.records[0].parts, &Pad::zero(Side::Left)).unwrap();
    assert_eq!(&*filled, [0, 0, 1, 1, 0, 1, 0, 1]);
}

#[test]
fn pieces_inside_of_rows_are_put_together_first() {
    let parts: Vec<(&[u64], Vec<Axis>, &[u8])> = vec![
        (&[1, 2, 1], mesh((0, shard(0)), (0, shard(2))), &[1, 3]),
        (&[1, 2, 1], mesh((0, shard(0)), (1, shard(2))), &[2, 4]),
        (&[1, 1, 1], mesh((1, shard(0)), (0, shard(2))), &[5]),
        (&[1, 1, 1], mesh((1, shard(0)), (1, shard(2))), &[6]),
    ];
    let (_dir, run) = run_of(&parts);
    assert_eq!(padded(&run, &pad(0, Side::Right)), (vec![2, 2, 2], vec![1, 2, 3, 4, 5, 6, 0, 0]));
}

#[test]
fn rows_of_rows_are_as_long_as_the_longest() {
    let parts: Vec<(&[u64], Vec<Axis>, &[u8])> = vec![
        (&[1, 1], mesh((0, shard(0)), (0, shard(0))), &[1]),
        (&[1, 2], mesh((0, shard(0)), (1, shard(0))), &[2, 3]),
        (&[1, 3], mesh((1, shard(0)), (0, shard(0))), &[4, 5, 6]),
        (&[1, 1], mesh((1, shard(0)), (1, shard(0))), &[7]),
    ];
    let (_dir, run) = run_of(&parts);
    assert_eq!(padded(&run, &pad(0, Side::Left)), (vec![4, 3], vec![0, 0, 1, 0, 2, 3, 4, 5, 6, 0, 0, 7]));
    let tree = layout::padded(&run.records[0].parts, &Pad::default()).unwrap();
    assert_eq!(sizes(&tree), Some((vec![4, 1], vec![4, 3])));
    assert_eq!(pieces(&tree).iter().map(|piece| piece.shape()[1]).collect::<Vec<_>>(), [1, 2, 3, 1]);
}

#[test]
fn what_is_no_rows_is_not_padded() {
    for (outer, inner) in [
        (Placement::Partial, shard(0)),
        (Placement::HeadTail { dim: 1 }, shard(0)),
        (shard(1), shard(0)),
        (shard(0), shard(1)),
        (shard(0), Placement::Partial),
    ] {
        let parts: Vec<(&[u64], Vec<Axis>, &[u8])> = vec![
            (&[1, 2], mesh((0, outer.clone()), (0, inner.clone())), &[1, 2]),
            (&[3, 4], mesh((0, outer.clone()), (1, inner.clone())), &[0; 12]),
            (&[1, 2], mesh((1, outer.clone()), (0, inner.clone())), &[1, 2]),
            (&[3, 4], mesh((1, outer.clone()), (1, inner.clone())), &[0; 12]),
        ];
        let (_dir, run) = run_of(&parts);
        let refused = run.padded(&run.records[0], &Pad::default()).unwrap_err().to_string();
        assert!(
            refused.contains("go together") || refused.contains("differ in shape"),
            "{outer:?} {inner:?} {refused}"
        );
    }
    // More dimensions on one rank.
    let (_dir, run) = run_of(&[(&[1, 2], dp(0, 2, shard(0)), &[1, 2]), (&[1, 1, 2], dp(1, 2, shard(0)), &[1, 2])]);
    assert!(run.padded(&run.records[0], &Pad::default()).is_err());
}

#[test]
fn few_bytes_make_no_whole_of_any_size() {
    let (_dir, run) = run_of(&[(&[1 << 40, 0], dp(0, 2, shard(0)), &[]), (&[1, 1], dp(1, 2, shard(0)), &[1])]);
    let refused = run.padded(&run.records[0], &Pad::default()).unwrap_err().to_string();
    assert!(refused.contains("once they are padded"), "{refused}");
}
