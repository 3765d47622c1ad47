use std::fs;

use proptest::prelude::*;
use wire::{
    dtype::DType,
    record::{Axis, MICRO, Placement, Sliced},
};

use super::*;
use crate::{
    format::{JobId, Line, MANIFEST_FILE, RUN_FILE},
    manifest::LineError,
    testing::{fixture::*, revision},
};

fn open(dir: &tempfile::TempDir) -> Run {
    Run::open(dir.path()).unwrap()
}

fn only(run: &Run) -> Whole {
    assert_eq!(run.records.len(), 1);
    let record = &run.records[0];
    let whole = run.whole(record).unwrap();
    // Both executors carry the plan out alike.
    let plan = AssemblyPlan::new(&record.parts).unwrap();
    assert_eq!(&*fill::own(&plan, run.shards()).unwrap(), &*whole.bytes);
    whole
}

fn mesh(dp: (u32, u32, Placement), tp: (u32, u32, Placement)) -> Vec<Axis> {
    let axis = |name: &str, (index, size, place)| Axis { name: name.into(), index, size, place, input_digest: None };
    vec![axis("dp", dp), axis("tp", tp)]
}

#[test]
fn uneven_batches_are_laid_in_rank_order_whatever_the_order_of_arrival() {
    let mut f = Fixture::default();
    f.part(id("mlp", 0), DType::Float32, &[1, 2], 1, dp(1, 2, shard(0)), &f32s(&[5.0, 6.0]));
    f.part(id("mlp", 0), DType::Float32, &[2, 2], 0, dp(0, 2, shard(0)), &f32s(&[1.0, 2.0, 3.0, 4.0]));
    let dir = f.finish();
    let whole = only(&open(&dir));
    assert_eq!(whole.shape, [3, 2]);
    assert_eq!(&*whole.bytes, f32s(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]));
    assert!(!whole.bytes.is_mapped());
}

#[test]
fn neighbours_in_a_shard_are_read_without_a_copy() {
    let mut f = Fixture::default();
    f.part(id("mlp", 0), DType::Float32, &[2, 1], 0, dp(0, 2, shard(0)), &f32s(&[1.0, 2.0]));
    f.part(id("mlp", 0), DType::Float32, &[1, 1], 1, dp(1, 2, shard(0)), &f32s(&[3.0]));
    let whole = only(&open(&f.finish()));
    assert!(whole.bytes.is_mapped());
    assert_eq!(&*whole.bytes, f32s(&[1.0, 2.0, 3.0]));
}

#[test]
fn shards_of_dimension_one_are_interleaved() {
    let mut f = Fixture::default();
    f.part(id("mlp", 0), DType::Float32, &[2, 2], 0, dp(0, 2, shard(1)), &f32s(&[1.0, 2.0, 4.0, 5.0]));
    f.part(id("mlp", 0), DType::Float32, &[2, 1], 1, dp(1, 2, shard(1)), &f32s(&[3.0, 6.0]));
    let whole = only(&open(&f.finish()));
    assert_eq!(whole.shape, [2, 3]);
    assert_eq!(&*whole.bytes, f32s(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]));
}

#[test]
fn two_axes_nest() {
    let mut f = Fixture::default();
    for (rank, (d, t)) in [(0, 0), (0, 1), (1, 0), (1, 1)].into_iter().enumerate() {
        let axes = mesh((d, 2, shard(0)), (t, 2, shard(1)));
        f.part(id("mlp", 0), DType::UInt8, &[1, 1], rank as u32, axes, &[10 * d as u8 + t as u8]);
    }
    let whole = only(&open(&f.finish()));
    assert_eq!((whole.shape, &*whole.bytes), (vec![2, 2], &[0u8, 1, 10, 11][..]));
}

#[test]
fn a_replica_is_enough_and_differing_ones_are_named() {
    let mut f = Fixture::default();
    f.part(id("one", 0), DType::UInt8, &[2], 1, dp(1, 2, Placement::Replicate), &[7, 8]);
    f.part(id("two", 0), DType::UInt8, &[2], 0, dp(0, 2, Placement::Replicate), &[7, 8]);
    f.part(id("two", 0), DType::UInt8, &[2], 1, dp(1, 2, Placement::Replicate), &[7, 9]);
    let dir = f.finish();
    let run = open(&dir);
    assert_eq!(&*run.whole(&run.records[0]).unwrap().bytes, [7, 8]);
    let e = run.whole(&run.records[1]).unwrap_err().to_string();
    assert!(e.contains("ranks 0 and 1 hold replicas that differ"), "{e}");
    assert_eq!(&*run.part(&run.records[1], 1).unwrap().bytes, [7, 9]);
}

#[test]
fn replicas_stand_in_for_each_other_on_every_axis() {
    let mut f = Fixture::default();
    f.part(id("m", 0), DType::UInt8, &[1], 0, mesh((0, 2, Placement::Replicate), (0, 2, shard(0))), &[1]);
    f.part(id("m", 0), DType::UInt8, &[1], 3, mesh((1, 2, Placement::Replicate), (1, 2, shard(0))), &[2]);
    assert_eq!(&*only(&open(&f.finish())).bytes, [1, 2]);
}

#[test]
fn pieces_from_head_and_tail_come_out_in_the_order_of_the_whole() {
    let mut f = Fixture::default();
    let cp = |rank, dim| dp(rank, 2, Placement::HeadTail { dim });
    for (rank, rows, columns) in [(0, [0, 1, 6, 7], [0, 3, 10, 13]), (1, [2, 3, 4, 5], [1, 2, 11, 12])] {
        f.part(id("rows", 0), DType::UInt8, &[2, 2], rank, cp(rank, 0), &rows);
        f.part(id("columns", 0), DType::UInt8, &[2, 2], rank, cp(rank, 1), &columns);
        f.part(id("odd", 0), DType::UInt8, &[1, 2], rank, cp(rank, 0), &[1, 2]);
    }
    let dir = f.finish();
    let run = open(&dir);
    let whole = |name: &str| run.whole(run.records.iter().find(|r| r.id.module == name).unwrap());
    assert_eq!(&*whole("rows").unwrap().bytes, [0, 1, 2, 3, 4, 5, 6, 7]);
    assert_eq!(&*whole("columns").unwrap().bytes, [0, 1, 2, 3, 10, 11, 12, 13]);
    let e = whole("odd").unwrap_err().to_string();
    assert!(e.contains("have no halves of one length"), "{e}");
}

#[test]
fn slices_are_of_tensors_that_go_together_and_equal_if_these_are() {
    let mut f = Fixture::default();
    let either = || Placement::ReplicateOrShard { dim: 0 };
    let mut part = |name: &str, rank, place: Placement, by: &str, of: u64, crc, bytes: [u8; 2]| {
        f.slice = Some(Sliced { by: by.into(), of: vec![of], crc });
        f.part(id(name, 0), DType::UInt8, &[1, 2], rank, dp(rank, 2, place), &bytes);
    };
    for rank in [0, 1] {
        let other = u64::from(rank);
        part("joined", rank, shard(0), "[:,-1]", 9, None, [1, 2]);
        part("ragged", rank, shard(0), "[:,-1]", 9 + other, None, [1, 2]);
        part("other", rank, shard(0), ["[:,-1]", "[:,0]"][rank as usize], 9, None, [1, 2]);
        part("rows", rank, either(), "[:,0]", 9, Some(rank), [1, 2]);
        part("same", rank, either(), "[:,0]", 9, Some(7), [1, 2]);
        part("known", rank, Placement::Unknown, "[:,0]", 9, Some(7), [1, 2]);
        part("chance", rank, Placement::Unknown, "[:,0]", 9, Some(rank), [1, 2]);
        part("unsummed", rank, Placement::Unknown, "[:,0]", 9, None, [1, 2]);
    }
    let dir = f.finish();
    let run = open(&dir);
    let whole = |name: &str| run.whole(run.records.iter().find(|r| r.id.module == name).unwrap());
    for (name, shape) in [("joined", [2, 2]), ("rows", [2, 2]), ("same", [1, 2]), ("known", [1, 2])] {
        assert_eq!(whole(name).unwrap().shape, shape, "{name}");
    }
    for (name, why) in [
        ("ragged", "rank 0 has [:,-1] of [9] and rank 1 has [:,-1] of [10]"),
        ("other", "rank 0 has [:,-1] of [9] and rank 1 has [:,0] of [9]"),
        ("chance", "is not known"),
        ("unsummed", "is not known"),
    ] {
        let e = whole(name).unwrap_err().to_string();
        assert!(e.contains(why), "{name}: {e}");
    }
}

#[test]
fn ambiguous_parts_are_one_if_equal_and_laid_together_if_not() {
    let mut f = Fixture::default();
    for rank in 0..2 {
        f.part(
            id("equal", 0),
            DType::UInt8,
            &[1, 2],
            rank,
            dp(rank, 2, Placement::ReplicateOrShard { dim: 0 }),
            &[7, 8],
        );
        f.part(
            id("other", 0),
            DType::UInt8,
            &[1, 2],
            rank,
            dp(rank, 2, Placement::ReplicateOrShard { dim: 0 }),
            &[7, rank as u8],
        );
    }
    let dir = f.finish();
    let run = open(&dir);
    assert_eq!(run.whole(&run.records[0]).unwrap().shape, [1, 2]);
    let other = run.whole(&run.records[1]).unwrap();
    assert_eq!((other.shape, &*other.bytes), (vec![2, 2], &[7u8, 0, 7, 1][..]));
}

#[test]
fn runs_of_elements_are_joined_and_take_the_shape() {
    let mut f = Fixture::default();
    for (rank, run) in [&[1u8][..], &[], &[2, 3, 4, 5, 6]].into_iter().enumerate() {
        let axes = dp(rank as u32, 3, Placement::Flat { shape: vec![2, 3] });
        f.part(id("m", 0), DType::UInt8, &[run.len() as u64], rank as u32, axes, run);
        f.part(
            id("n", 0),
            DType::UInt8,
            &[1],
            rank as u32,
            dp(rank as u32, 3, Placement::Flat { shape: vec![2] }),
            &[9],
        );
    }
    let dir = f.finish();
    let run = open(&dir);
    let whole = run.whole(&run.records[0]).unwrap();
    assert_eq!((whole.shape, &*whole.bytes), (vec![2, 3], &[1u8, 2, 3, 4, 5, 6][..]));
    assert!(run.whole(&run.records[1]).unwrap_err().to_string().contains("do not make [2]"));
}

#[test]
fn a_batch_of_one_beside_larger_ones_is_a_piece_of_the_batch() {
    for (first, second) in
        [(Placement::ReplicateOrShard { dim: 0 }, shard(0)), (shard(0), Placement::ReplicateOrShard { dim: 0 })]
    {
        let mut f = Fixture::default();
        f.part(id("m", 0), DType::UInt8, &[1, 2], 0, dp(0, 2, first), &[7, 8]);
        f.part(id("m", 0), DType::UInt8, &[1, 2], 1, dp(1, 2, second), &[7, 8]);
        assert_eq!(only(&open(&f.finish())).shape, [2, 2]);
    }
}

#[test]
fn equal_bytes_are_whole_where_the_layout_is_not_known() {
    let mut f = Fixture::default();
    for rank in 0..2 {
        f.part(id("m", 0), DType::UInt8, &[2], rank, dp(rank, 2, Placement::Unknown), &[7, 8]);
    }
    assert_eq!(&*only(&open(&f.finish())).bytes, [7, 8]);
}

#[test]
fn equal_bytes_are_whole_also_where_each_rank_has_several_parts() {
    let mut f = Fixture::default();
    for rank in 0..2 {
        for index in 0..2u8 {
            let micro = Axis { name: MICRO.into(), index: index.into(), size: 2, place: shard(0), input_digest: None };
            let axes = [dp(rank, 2, Placement::Unknown), vec![micro]].concat();
            f.part(id("same", 0), DType::UInt8, &[1], rank, axes.clone(), &[index]);
            f.part(id("other", 0), DType::UInt8, &[1], rank, axes, &[index * rank as u8]);
        }
    }
    let dir = f.finish();
    let run = open(&dir);
    let whole = |name: &str| run.whole(run.records.iter().find(|r| r.id.module == name).unwrap());
    assert_eq!(&*whole("same").unwrap().bytes, [0, 1]);
    assert!(whole("other").is_err());
}

#[test]
fn ranks_that_were_given_the_same_are_no_pieces_of_a_batch() {
    let mut f = Fixture::default();
    let supposed = |rank, given| vec![Axis { input_digest: Some(given), ..dp(rank, 3, shard(0)).remove(0) }];
    for rank in 0..3u32 {
        f.part(id("other", 0), DType::UInt8, &[1], rank, supposed(rank, rank), &[rank as u8]);
        // Two of them were.
        f.part(id("same", 0), DType::UInt8, &[1], rank, supposed(rank, rank / 2), &[rank as u8]);
        f.part(id("equal", 0), DType::UInt8, &[1], rank, supposed(rank, 9), &[5]);
    }
    let dir = f.finish();
    let run = open(&dir);
    let find = |name: &str| run.records.iter().find(|r| r.id.module == name).unwrap();
    assert_eq!(&*run.whole(find("other")).unwrap().bytes, [0, 1, 2]);
    assert_eq!(&*run.whole(find("equal")).unwrap().bytes, [5]);
    let e = run.whole(find("same")).unwrap_err().to_string();
    assert!(e.contains("along axis dp is not known"), "{e}");
    assert_eq!(["other", "same", "equal"].map(|name| find(name).data_size()), [3, 1, 1]);
}

#[test]
fn addends_are_summed_in_their_type() {
    let mut f = Fixture::default();
    for rank in 0..3 {
        // 1.0, 2.0 and 3.0 as bfloat16.
        let bits: u16 = [0x3f80, 0x4000, 0x4040][rank as usize];
        f.part(id("mlp", 0), DType::BFloat16, &[1], rank, dp(rank, 3, Placement::Partial), &bits.to_le_bytes());
    }
    assert_eq!(&*only(&open(&f.finish())).bytes, 0x40c0u16.to_le_bytes());
}

#[test]
fn parts_without_a_layout_are_named_and_readable_one_by_one() {
    let mut f = Fixture::default();
    for rank in 0..2 {
        f.part(
            id("mlp", 0),
            DType::UInt8,
            &[1 + u64::from(rank)],
            rank,
            dp(rank, 2, Placement::Unknown),
            &vec![9; 1 + rank as usize],
        );
    }
    let dir = f.finish();
    let run = open(&dir);
    let e = run.whole(&run.records[0]).unwrap_err().to_string();
    assert!(e.contains("rank 0 [1]") && e.contains("rank 1 [2]"), "{e}");
    assert_eq!(run.part(&run.records[0], 1).unwrap().shape, [2]);
    assert!(run.part(&run.records[0], 5).unwrap_err().to_string().contains("there is 0, 1"));
}

#[test]
fn a_coordinate_outside_of_its_axis_is_a_conflict() {
    let mut f = Fixture::default();
    f.part(id("m", 0), DType::UInt8, &[1], 0, dp(0, 2, shard(0)), &[1]);
    f.part(id("m", 0), DType::UInt8, &[1], 1, dp(1, 2, shard(0)), &[2]);
    let mut parts = open(&f.finish()).records[0].parts.clone();
    for outside in [2, u32::MAX] {
        parts[1].what.axes[0].index = outside;
        let conflict = LayoutError::Conflict(format!("rank 1 says dp {outside} of 2"));
        assert_eq!(layout::plan(&parts), Err(conflict));
        assert!(crate::manifest::decode_line(&crate::manifest::encode_line(&Line::Part(parts[1].clone()))).is_err());
    }
}

#[test]
fn a_missing_rank_is_named_by_its_number() {
    let mut f = Fixture::default();
    for (module, ranks) in [("full", vec![0, 1]), ("half", vec![0])] {
        for rank in ranks {
            f.part(id(module, 0), DType::UInt8, &[1], rank, dp(rank, 2, shard(0)), &[1]);
        }
    }
    let dir = f.kill();
    let run = open(&dir);
    let e = run.whole(&run.records[1]).unwrap_err();
    assert!(matches!(e, ReadError::Incomplete(_)));
    assert!(e.to_string().ends_with("no part from dp 1 of 2 (rank 1)"), "{e}");
    assert_eq!(run.whole(&run.records[0]).unwrap().shape, [2]);
}

#[test]
fn empty_and_scalar_tensors_are_whole() {
    let mut f = Fixture::default();
    f.part(id("empty", 0), DType::Float32, &[0, 4], 0, dp(0, 2, shard(0)), &[]);
    f.part(id("empty", 0), DType::Float32, &[0, 4], 1, dp(1, 2, shard(0)), &[]);
    f.part(id("scalar", 0), DType::Float32, &[], 0, Vec::new(), &f32s(&[2.5]));
    let dir = f.finish();
    let run = open(&dir);
    let empty = run.whole(&run.records[0]).unwrap();
    assert_eq!((empty.shape, empty.bytes.len()), (vec![0, 4], 0));
    assert_eq!(run.whole(&run.records[1]).unwrap().shape, [0; 0]);
}

#[test]
fn a_record_is_of_the_revision_of_its_parts() {
    let mut f = Fixture::default();
    for (step, revisions) in [(0, [0, 0]), (1, [2, 2]), (2, [2, 1])] {
        for rank in 0..2 {
            f.revision = revisions[rank as usize];
            f.part(id("a", step), DType::UInt8, &[1], rank, dp(rank, 2, shard(0)), &[1]);
        }
    }
    let told = [revision(JobId::default(), 1, 9, &["b"]), revision(JobId::default(), 2, 1, &["a"])];
    [&told[1], &revision(JobId::default(), 1, 0, &[]), &told[0]]
        .into_iter()
        .for_each(|told| f.line(&Line::Revision(told.clone())));
    let run = open(&f.finish());
    assert_eq!(run.records.iter().map(|record| record.revision()).collect::<Vec<_>>(), [0, 2, 1]);
    assert_eq!(run.revisions, told);
    assert!(run.problems.is_empty());
}

#[test]
fn a_damaged_line_costs_its_part_and_a_torn_one_is_a_note() {
    let mut f = Fixture::default();
    f.part(id("a", 0), DType::UInt8, &[1], 0, Vec::new(), &[1]);
    let from = f.lines.len();
    f.part(id("b", 0), DType::UInt8, &[1], 0, Vec::new(), &[2]);
    let at = from + f.lines[from..].windows(3).position(|w| w == b"\"b\"").unwrap() + 1;
    f.lines[at] = b'x';
    f.part(id("c", 0), DType::UInt8, &[1], 0, Vec::new(), &[3]);
    f.lines.extend_from_slice(b"{\"crc\":\"0000");
    let dir = f.kill();
    let run = open(&dir);
    assert_eq!(run.modules(), ["a", "c"]);
    assert_eq!(run.problems.len(), 1);
    assert_eq!(run.problems[0].place(), "manifest.jsonl line 2");
    assert_eq!(run.notes.len(), 1);
    assert_eq!(&*run.whole(&run.records[1]).unwrap().bytes, [3]);
}

#[test]
fn a_damaged_shard_costs_its_bytes_alone() {
    let mut f = Fixture::default();
    f.part(id("a", 0), DType::UInt8, &[4], 0, Vec::new(), &[1; 4]);
    f.part(id("b", 0), DType::UInt8, &[4], 0, Vec::new(), &[2; 4]);
    let dir = f.finish();
    let path = dir.path().join("shard-00000.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    bytes[crate::format::HEADER_SPACE as usize + 5] ^= 1;
    fs::write(&path, bytes).unwrap();
    let run = open(&dir);
    assert_eq!(run.whole(&run.records[0]).unwrap().bytes.len(), 4);
    let e = run.whole(&run.records[1]).unwrap_err();
    assert!(matches!(&e, ReadError::Damage(text) if text.contains("shard-00000") && text.contains("checksum")), "{e}");
}

#[test]
fn a_shard_that_is_short_or_gone_is_named_once() {
    let mut f = Fixture::default();
    f.part(id("mlp", 0), DType::UInt8, &[3], 0, Vec::new(), &[1, 2, 3]);
    let dir = f.kill();
    let run = open(&dir);
    assert!(run.shard_problems().is_empty());
    let shard = dir.path().join("shard-00000.open");
    fs::File::options().write(true).open(&shard).unwrap().set_len((1 << 20) + 2).unwrap();
    assert!(run.shard_problems()[0].contains("shard-00000 is cut short"));
    fs::remove_file(shard).unwrap();
    assert!(run.shard_problems()[0].contains("shard-00000.safetensors is missing"));
}

#[test]
fn what_is_no_run_is_refused_with_the_reason() {
    let dir = tempfile::tempdir().unwrap();
    let refusal = |path: &Path| Run::open(path).err().unwrap().to_string();
    assert!(refusal(&dir.path().join("nothing")).ends_with("no such run directory"));
    assert!(refusal(dir.path()).contains("not a FlexModel run"));
    let mut f = Fixture::default();
    f.part(id("a", 0), DType::UInt8, &[1], 0, Vec::new(), &[1]);
    let run = f.finish();
    fs::remove_file(run.path().join(MANIFEST_FILE)).unwrap();
    assert!(refusal(run.path()).contains("copied in part"));
    fs::write(run.path().join(RUN_FILE), "{\"format\":99,\"flexmodel\":\"9.0\"}").unwrap();
    assert!(refusal(run.path()).contains("format 99"));
    let parent = tempfile::tempdir().unwrap();
    fs::rename(run.path(), parent.path().join("x")).unwrap();
    let why = refusal(parent.path());
    assert!(why.contains("not a FlexModel run") && why.contains("there is one in it"), "{why}");
}

#[test]
fn a_damaged_run_file_is_a_problem_and_the_records_are_served() {
    let mut f = Fixture::default();
    f.part(id("a", 0), DType::UInt8, &[1], 0, Vec::new(), &[1]);
    let dir = f.finish();
    fs::write(dir.path().join(RUN_FILE), "{\"format\":1,").unwrap();
    let run = open(&dir);
    assert_eq!(run.problems.len(), 1);
    assert_eq!(run.records.len(), 1);
}

#[test]
fn statistics_alone_are_not_bytes() {
    let mut f = Fixture::default();
    let mut part = Fixture::default();
    part.part(id("a", 0), DType::UInt8, &[1], 0, Vec::new(), &[1]);
    let Line::Part(mut stats_only) = crate::manifest::decode_line(&part.lines).unwrap() else { panic!("not a part") };
    (stats_only.at, stats_only.stats) = (None, Some(Stats { count: 1, ..Stats::default() }));
    f.line(&Line::Part(stats_only));
    let dir = f.finish();
    let run = open(&dir);
    assert!(run.whole(&run.records[0]).unwrap_err().to_string().contains("reduce=stats"));
}

#[test]
fn a_run_whose_agent_was_killed_before_the_first_record_is_not_damaged() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join(MANIFEST_FILE), "").unwrap();
    let run = open(&dir);
    assert_eq!(run.problems, []);
    assert_eq!(run.notes[0].said, Said::NothingCaptured);
    let mut f = Fixture::default();
    f.part(id("mlp", 0), DType::UInt8, &[1], 0, Vec::new(), &[1]);
    let dir = f.finish();
    fs::remove_file(dir.path().join(RUN_FILE)).unwrap();
    assert_eq!(open(&dir).problems.len(), 1, "records without what they are of");
}

/// JSON of a part with hostile numbers in it.
fn hostile_part() -> impl Strategy<Value = String> {
    let number = || prop_oneof![Just(0u64), 0u64..5, Just(u64::MAX), Just(1 << 40), any::<u64>()];
    let place = prop_oneof![
        Just("\"replicate\"".to_owned()),
        Just("\"partial\"".to_owned()),
        Just("\"unknown\"".to_owned()),
        Just("{\"replicate_or_shard\":{\"dim\":0}}".to_owned()),
        (0u32..70).prop_map(|dim| format!("{{\"shard\":{{\"dim\":{dim}}}}}")),
    ];
    let axis = (0u32..3, prop_oneof![0u32..4, Just(u32::MAX)], place).prop_map(|(index, size, place)| {
        format!("{{\"name\":\"dp\",\"index\":{index},\"size\":{size},\"place\":{place}}}")
    });
    let shape = proptest::collection::vec(number(), 0..4);
    let dtype = prop_oneof![Just("float32"), Just("bfloat16"), Just("bool"), Just("complex32"), Just("int64")];
    let name = prop_oneof![Just("shard-00000"), Just("../x"), Just("")];
    (shape, dtype, proptest::collection::vec(axis, 0..3), 0u32..3, name, (number(), number(), any::<u32>()))
        .prop_map(|(shape, dtype, axes, rank, shard, (offset, len, crc))| {
            let offset = offset.saturating_add(crate::format::HEADER_SPACE);
            format!(
                "{{\"t\":\"part\",\"module\":\"m\",\"kind\":\"forward\",\"path\":\"out\",\"model\":0,\"step\":0,\"micro\":0,\
                 \"call\":0,\"repeat\":0,\"train\":true,\"class\":\"\",\"group\":\"\",\"dtype\":\"{dtype}\",\
                 \"shape\":{shape:?},\"rank\":{rank},\"axes\":[{}],\"dp_size\":1,\"time_ns\":0,\"at\":{{\"shard\":\"{shard}\",\
                 \"offset\":{offset},\"len\":{len},\"crc\":{crc}}},\"stats\":null}}",
                axes.join(",")
            )
        })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn hostile_manifests_never_panic(
        parts in proptest::collection::vec(hostile_part(), 1..5),
        junk in proptest::collection::vec(any::<u8>(), 0..60),
    ) {
        let mut f = Fixture::default();
        f.part(id("m", 0), DType::UInt8, &[3], 2, Vec::new(), &[1, 2, 3]);
        for part in &parts {
            let line = line_of(part);
            // Some of them are beyond the bounds; all are lines.
            let read = crate::manifest::decode_line(&line);
            let is_line = matches!(read, Ok(_) | Err(LineError::Impossible(_)));
            prop_assert!(is_line, "the test's own line does not read: {part}");
            f.lines.extend(line);
        }
        f.lines.extend(junk);
        let dir = f.finish();
        let run = open(&dir);
        for record in &run.records {
            let _ = record.shape();
            let _ = run.whole(record);
            let _ = record.stored_bytes();
            let _ = run.part(record, 0);
        }
        let mut problems = Vec::new();
        sealed::check(&run, &mut problems);
    }
}
