//! Tests of reading elements through a layout: the same numbers as putting the whole together.

use flexmodel_run::{
    ReadError,
    format::{HEADER_SPACE, Location, RunInfo, What},
    manifest::{Reader, decode_line, encode_line},
    read::{
        assemble::{self, Bytes},
        layout,
        number::component,
        rows::{Number, Side},
    },
    stats::to_f64,
    testing::{self, fixture::*},
};
use wire::{
    dtype::DType,
    record::{MICRO, Placement},
};

use super::*;
use crate::{dashboard::windows::Parts, live::SeriesQuery};

/// Parts that are in memory.
impl Parts for &[Vec<u8>] {
    fn bytes(&mut self, part: usize, begin: u64, len: usize) -> Result<&[u8], String> {
        Ok(&self[part][begin as usize..begin as usize + len])
    }
}

struct Case {
    parts: Vec<Part>,
    bytes: Vec<Vec<u8>>,
}

/// Name, index, size, place.
type Along<'a> = (&'a str, u32, u32, Placement);

/// Parts with different elements, one a rank: shape and axes.
fn case(dtype: DType, ranks: &[(&[u64], &[Along<'_>])]) -> Case {
    let mut out = Case { parts: Vec::new(), bytes: Vec::new() };
    for (rank, (shape, axes)) in ranks.iter().enumerate() {
        let mut what = What::from_meta(testing::meta("m", 0, 1));
        what.rank = rank as u32;
        what.dtype = dtype;
        what.shape = shape.to_vec();
        what.axes = axes
            .iter()
            .map(|(name, index, size, place)| Axis {
                name: (*name).into(),
                index: *index,
                size: *size,
                place: place.clone(),
                input_digest: None,
            })
            .collect();
        let real = component(dtype);
        let numbers = shape.iter().product::<u64>() as usize * dtype.size() / real.size();
        let bytes = (0..numbers).flat_map(|i| ((100 * rank + i) as f32).to_le_bytes()).collect::<Vec<u8>>();
        let at = Location { shard: "s".into(), offset: 0, len: bytes.len() as u64, crc: rank as u32 };
        out.parts.push(Part { what, at: Some(at), stats: None, same: None });
        out.bytes.push(bytes);
    }
    out
}

fn check(case: Case) {
    check_padded(case, Side::Right);
}

fn check_padded(case: Case, side: Side) {
    let dtype = case.parts[0].what.dtype;
    let pad = Pad::new(Number::Integer(7), dtype, side).unwrap();
    let node = layout::padded(&case.parts, &pad).unwrap();
    let leaf = |i: usize| Ok::<_, ReadError>(Bytes::Owned(case.bytes[i].clone()));
    let whole = assemble::assemble(&node, dtype, &mut { leaf }).unwrap();
    let expected: Vec<f64> = whole.chunks_exact(dtype.size()).map(|x| to_f64(dtype, x)).collect();
    let source = Source::new(&node, dtype, case.bytes.as_slice());
    let shape = node.shape().to_vec();
    let cols = *shape.last().unwrap();
    let mut at = 0;
    for row in 0..expected.len() as u64 / cols {
        let mut coordinates = vec![0; shape.len() - 1];
        let mut rest = row;
        for (c, dim) in coordinates.iter_mut().zip(&shape).rev() {
            *c = rest % dim;
            rest /= dim;
        }
        for start in 0..cols {
            let mut out = vec![f64::NAN; (cols - start) as usize];
            source.read(&coordinates, start, &mut out).unwrap();
            assert_eq!(out, expected[at + start as usize..at + cols as usize], "row {row} from {start}");
        }
        at += cols as usize;
    }
}

#[test]
fn uneven_pieces_of_every_dimension_read_as_the_whole() {
    check(case(DType::Float32, &[(&[2, 3, 4], &[("dp", 0, 2, shard(0))]), (&[1, 3, 4], &[("dp", 1, 2, shard(0))])]));
    check(case(DType::Float32, &[(&[2, 3, 4], &[("dp", 0, 2, shard(1))]), (&[2, 2, 4], &[("dp", 1, 2, shard(1))])]));
    check(case(DType::Float32, &[(&[2, 3, 4], &[("tp", 0, 2, shard(2))]), (&[2, 3, 1], &[("tp", 1, 2, shard(2))])]));
}

#[test]
fn rows_of_several_sizes_read_as_the_whole() {
    for side in Side::ALL {
        let axes = |i| [("dp", i, 3, shard(0))];
        let place = [axes(0), axes(1), axes(2)];
        let rows: [(DType, [&[u64]; 3]); 3] = [
            (DType::Float32, [&[2, 3, 4], &[1, 5, 4], &[1, 1, 4]]),
            (DType::Complex64, [&[1, 2, 3, 3], &[2, 2, 1, 4], &[1, 2, 2, 2]]),
            (DType::Float32, [&[2, 3], &[0, 5], &[1, 4]]),
        ];
        for (dtype, shapes) in rows {
            let ranks: Vec<_> = shapes.into_iter().zip(&place).map(|(shape, axes)| (shape, &axes[..])).collect();
            check_padded(case(dtype, &ranks), side);
        }
    }
}

#[test]
fn two_mesh_axes_read_as_the_whole() {
    let place = |dp, tp| [("dp", dp, 2, shard(0)), ("tp", tp, 2, shard(1))];
    let axes: Vec<_> = [(0, 0), (0, 1), (1, 0), (1, 1)].map(|(dp, tp)| place(dp, tp)).into();
    check(case(DType::Float32, &[(&[2, 3], &axes[0]), (&[2, 5], &axes[1]), (&[1, 3], &axes[2]), (&[1, 5], &axes[3])]));
}

#[test]
fn pieces_from_head_and_tail_read_as_the_whole() {
    for dim in 0..2 {
        let axes = |i| [("cp", i, 3, Placement::HeadTail { dim })];
        let place = [axes(0), axes(1), axes(2)];
        check(case(DType::Float32, &[(&[4, 2], &place[0]), (&[4, 2], &place[1]), (&[4, 2], &place[2])]));
    }
}

#[test]
fn addends_and_complex_elements_read_as_the_whole() {
    let axes = |i| [("tp", i, 2, Placement::Partial)];
    check(case(DType::Float32, &[(&[2, 3], &axes(0)), (&[2, 3], &axes(1))]));
    check(case(DType::Complex64, &[(&[2, 3], &axes(0)), (&[2, 3], &axes(1))]));
    let axes = |i| [("dp", i, 2, shard(1))];
    check(case(DType::Complex64, &[(&[2, 3], &axes(0)), (&[2, 1], &axes(1))]));
}

#[test]
fn where_a_rank_captured_a_record_again_its_first_part_is_shown() {
    let dir = tempfile::tempdir().unwrap();
    let mut shard = vec![0; HEADER_SPACE as usize];
    let mut part = |step: u64, value: f32| {
        let bytes = [value; 4].map(f32::to_le_bytes).concat();
        let at = Location { shard: "shard-00000".into(), offset: shard.len() as u64, len: 16, crc: 0 };
        shard.extend_from_slice(&bytes);
        Part { what: What::from_meta(testing::meta("m", step, 1)), at: Some(at), stats: None, same: None }
    };
    let parts = [part(0, 1.0), part(1, 3.0), part(0, 2.0)];
    std::fs::write(dir.path().join("shard-00000.open"), &shard).unwrap();
    let manifest = parts.each_ref().map(|part| encode_line(&Line::Part(part.clone())));
    std::fs::write(dir.path().join(MANIFEST_FILE), manifest.concat()).unwrap();
    let tensors = Tensors::new(dir.path().to_owned());
    let shown = |live: &Live| {
        let look = tensors.look(live, &parts[0].what.id, None).unwrap();
        let picture = serde_json::to_value(&look.picture).unwrap();
        (look.parts.len(), picture["stats"]["max"].as_f64())
    };
    let live = Live::new(RunInfo::default());
    assert_eq!(shown(&live), (1, Some(1.0)), "by the manifest");
    parts.iter().for_each(|part| live.told(&Told::part(part.clone())));
    assert_eq!(shown(&live), (1, Some(1.0)), "by what is remembered");
}

/// What the page shows of the one record of a run, by the manifest and by what is remembered: shape, elements, ranks.
fn shown(fixture: Fixture, rank: Option<u32>) -> [Result<serde_json::Value, String>; 2] {
    let lines = Reader::new(&fixture.lines[..]).map(|entry| entry.unwrap().line.unwrap());
    let parts: Vec<Part> =
        lines.filter_map(|line| if let Line::Part(part) = line { Some(part) } else { None }).collect();
    let dir = fixture.kill();
    let tensors = Tensors::new(dir.path().to_owned());
    let remembered = Live::new(RunInfo::default());
    parts.iter().for_each(|part| remembered.told(&Told::part(part.clone())));
    assert!(remembered.pick(&parts[0].what.id).is_some());
    [Live::new(RunInfo::default()), remembered].map(|live| {
        let look = serde_json::to_value(tensors.look(&live, &parts[0].what.id, rank)?).unwrap();
        let ranks: Vec<_> = look["parts"].as_array().unwrap().iter().map(|part| part["rank"].clone()).collect();
        Ok(serde_json::json!([look["shape"], look["heat"]["mean"], ranks]))
    })
}

#[test]
fn the_microbatches_of_every_rank_are_parts_of_the_whole() {
    let run = || {
        let mut f = Fixture::default();
        for (rank, micro) in [(1, 1), (0, 0), (1, 0), (0, 1)] {
            let axes = [dp(rank, 2, shard(0)), vec![Axis { name: MICRO.into(), ..dp(micro, 2, shard(0)).remove(0) }]];
            f.part(id("m", 0), DType::UInt8, &[1, 1], rank, axes.concat(), &[(10 * rank + micro) as u8]);
        }
        f
    };
    for whole in shown(run(), None) {
        assert_eq!(whole.unwrap(), serde_json::json!([[4, 1], [0.0, 1.0, 10.0, 11.0], [0, 0, 1, 1]]));
    }
    for part in shown(run(), Some(1)) {
        assert_eq!(part.unwrap(), serde_json::json!([[2, 1], [10.0, 11.0], [0, 0, 1, 1]]));
    }
}

#[test]
fn a_replica_that_sent_a_checksum_has_the_bytes_of_its_equal() {
    // Which of them sent the bytes, and whether they came last.
    for sender in [0, 1] {
        for checksum_first in [false, true] {
            let run = || {
                let mut bytes = Fixture::default();
                bytes.part(id("m", 0), DType::UInt8, &[2], sender, dp(sender, 2, Placement::Replicate), &[7, 8]);
                let mut checksum = Fixture::default();
                checksum.part(
                    id("m", 0),
                    DType::UInt8,
                    &[2],
                    1 - sender,
                    dp(1 - sender, 2, Placement::Replicate),
                    &[7, 8],
                );
                let Line::Part(mut part) = decode_line(&checksum.lines).unwrap() else { panic!("not a part") };
                part.same = part.at.take().map(|at| at.crc);
                let line = encode_line(&Line::Part(part));
                bytes.lines = if checksum_first { [line, bytes.lines].concat() } else { [bytes.lines, line].concat() };
                bytes
            };
            for rank in [None, Some(0), Some(1)] {
                for look in shown(run(), rank) {
                    assert_eq!(look.unwrap(), serde_json::json!([[2], [7.0, 8.0], [0, 1]]), "{sender} {rank:?}");
                }
            }
        }
    }
}

/// The rules of the one reader hold here too: no byte is in two pieces of a whole.
#[test]
fn pieces_that_share_bytes_are_refused() {
    let mut f = Fixture::default();
    f.part(id("m", 0), DType::UInt8, &[2], 0, dp(0, 2, shard(0)), &[7, 8]);
    let Line::Part(mut part) = decode_line(&f.lines).unwrap() else { panic!("not a part") };
    (part.what.rank, part.what.axes) = (1, dp(1, 2, shard(0)));
    f.line(&Line::Part(part));
    for look in shown(f, None) {
        let error = look.unwrap_err();
        assert!(error.contains("two of its pieces have the byte"), "{error}");
    }
}

/// More parts than there are windows, and a part that is longer than a window.
#[test]
fn every_element_is_read_through_few_and_short_windows() {
    for (ranks, rows, cols) in [(100u32, 2u64, 5000u64), (1, 1000, 1000)] {
        let dir = tempfile::tempdir().unwrap();
        let live = Live::new(RunInfo::default());
        let value = |rank: u32, n: u64| (u64::from(rank) * 7 + n) as f32;
        let mut sum = 0.0;
        for rank in 0..ranks {
            let mut what = What::from_meta(testing::meta("m", 0, 1));
            (what.rank, what.shape) = (rank, vec![rows, cols]);
            what.axes = vec![Axis { name: "tp".into(), index: rank, size: ranks, place: shard(1), input_digest: None }];
            let values = (0..rows * cols).map(|n| value(rank, n));
            sum += values.clone().map(f64::from).sum::<f64>();
            let stem = format!("shard-{rank:05}");
            let file = [vec![0; HEADER_SPACE as usize], values.flat_map(f32::to_le_bytes).collect()].concat();
            std::fs::write(dir.path().join(format!("{stem}.open")), &file).unwrap();
            let at = Location { shard: stem, offset: HEADER_SPACE, len: rows * cols * 4, crc: 0 };
            live.told(&Told::part(Part { what, at: Some(at), stats: None, same: None }));
        }
        let id = live.records(&SeriesQuery { module: "m".into(), ..SeriesQuery::default() }, 1).remove(0).id;
        let look = Tensors::new(dir.path().to_owned()).look(&live, &id, None).unwrap();
        let stats = &serde_json::to_value(&look.picture).unwrap()["stats"];
        let elements = u64::from(ranks) * rows * cols;
        assert_eq!((stats["count"].as_u64(), stats["min"].as_f64()), (Some(elements), Some(0.0)));
        assert_eq!(stats["max"].as_f64(), Some(f64::from(value(ranks - 1, rows * cols - 1))));
        assert!((stats["mean"].as_f64().unwrap() / (sum / elements as f64) - 1.0).abs() < 1e-9);
    }
}

/// A shard that was cut short, before it is looked at and while it is.
#[test]
fn a_shard_that_is_cut_short_is_an_error_that_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("shard-00000.open");
    let place = |len| Location { shard: "shard-00000".into(), offset: HEADER_SPACE, len, crc: 0 };
    std::fs::write(&path, vec![7; HEADER_SPACE as usize + (1 << 20)]).unwrap();
    let shards = Shards::new(dir.path());
    let says = |error: String| {
        let said = error.contains("shard-00000.open") && error.contains("the file is shorter than the manifest says");
        assert!(said, "{error}");
    };
    says(Windows::new(&shards, vec![Some(place(1 << 21))]).err().unwrap());
    let mut parts = Windows::new(&shards, vec![None, Some(place(1 << 20))]).unwrap();
    assert_eq!(parts.bytes(1, 0, 4).unwrap(), [7; 4]);
    std::fs::File::options().write(true).open(&path).unwrap().set_len(HEADER_SPACE + 100).unwrap();
    says(parts.bytes(1, 1 << 19, 4).unwrap_err());
}
