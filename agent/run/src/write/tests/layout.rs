//! Where parts lie, and what they are called.

use wire::{
    dtype::DType,
    passes::{Group, Pass, runs},
    record::Placement,
};

use super::{
    place::{FULL_BYTES, FULL_ROOMS},
    *,
};
use crate::{
    format::JobInfo,
    testing::{batch, meta, on_rank},
};

#[test]
fn a_whole_part_is_one_entry_with_its_own_name() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    let record = meta("layers.0.mlp", 3, 5);
    let bytes = bytes_of(&record, 1);
    let (part, _) = put(&store, &record, &bytes);
    assert_eq!(part.stats.unwrap().count, 20);
    store.finish(true);
    let found = sealed(dir.path(), "shard-00000");
    let (dtype, shape, data) = &found["layers.0.mlp:forward:out@model0.step3.micro0.call0"];
    assert_eq!((dtype.as_str(), shape.as_slice(), data), ("F32", &[5, 4][..], &bytes));
    assert_eq!(found.len(), 1);
    assert_sound(dir.path());
    assert_eq!(at(dir.path(), part.at.as_ref().unwrap()), bytes);
}

#[test]
fn pieces_of_the_batch_become_one_range_whatever_their_order() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    // 17 * 4 * 4 bytes is no multiple of the alignment.
    for rank in [2, 0, 1] {
        let record = on_rank(meta("a", 0, 17), rank, 3, batch());
        put(&store, &record, &bytes_of(&record, rank as u8));
        put(&store, &meta("between", u64::from(rank), 1), &[0; 16]);
    }
    store.finish(true);
    let found = sealed(dir.path(), "shard-00000");
    let (_, shape, data) = &found["a:forward:out@model0.step0.micro0.call0"];
    let record = meta("a", 0, 17);
    assert_eq!(shape, &[51, 4]);
    assert_eq!(*data, [0, 1, 2].map(|rank| bytes_of(&record, rank)).concat());
    assert_sound(dir.path());
}

#[test]
fn what_a_record_takes_on_a_node_does_not_grow_with_the_job() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    let (ranks, world, steps) = (8..16, 512, 3 * u64::from(FULL_ROOMS));
    let mut last = Vec::new();
    for step in 0..steps {
        last = ranks
            .clone()
            .map(|rank| {
                let record = on_rank(meta("a", step, 4), rank, world, batch());
                put(&store, &record, &bytes_of(&record, rank as u8)).0.at.unwrap()
            })
            .collect();
    }
    store.finish(true);
    for (a, b) in last.iter().zip(&last[1..]) {
        assert_eq!((&a.shard, a.offset + a.len), (&b.shard, b.offset), "pieces of a node lie side by side");
    }
    let length = |path: std::path::PathBuf| std::fs::metadata(path).unwrap().len() - crate::format::HEADER_SPACE;
    let total: u64 =
        (0..).map_while(|n| Some(shard::sealed_path(dir.path(), n)).filter(|p| p.exists())).map(length).sum();
    let piece = last[0].len;
    let most = u64::from(FULL_ROOMS) * 512 * piece + (steps - u64::from(FULL_ROOMS)) * 8 * piece;
    assert!(total <= most, "{total} bytes of file, expected {most} at most");
    assert_sound(dir.path());
}

#[test]
fn large_wholes_are_learned_from_sooner() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    // Each would be half of what may be kept for pieces of other nodes.
    let (rows, world) = (1 << 12, 1 << 13);
    for step in 0..6 {
        let record = on_rank(meta("a", step, rows), world - 1, world, batch());
        assert_eq!(record.payload_len().unwrap() * u64::from(world), FULL_BYTES / 2);
        put(&store, &record, &bytes_of(&record, 1));
    }
    store.finish(true);
    let files = std::fs::read_dir(dir.path()).unwrap().map(|f| f.unwrap().metadata().unwrap().len());
    assert!(files.sum::<u64>() < 2 * FULL_BYTES);
    assert_sound(dir.path());
}

#[test]
fn a_rank_that_comes_late_has_room_from_then_on() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    let mut lie = Vec::new();
    for step in 0..u64::from(FULL_ROOMS) + 3 {
        let late = step > u64::from(FULL_ROOMS);
        let of = |rank: u32| {
            let record = on_rank(meta("a", step, 4), rank, 4, batch());
            put(&store, &record, &bytes_of(&record, rank as u8)).0.at.unwrap()
        };
        let parts: Vec<_> = [0, 1].into_iter().chain(late.then_some(2)).map(of).collect();
        lie = parts.iter().map(|at| at.offset).collect();
    }
    let record = meta("a", 0, 4);
    let piece = bytes_of(&record, 0).len() as u64;
    assert_eq!(lie, [lie[0], lie[0] + piece, lie[0] + 2 * piece]);
    store.finish(true);
    assert_sound(dir.path());
}

#[test]
fn a_shorter_last_piece_still_joins_and_a_longer_one_lies_apart() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    for (name, rows) in [("short", [4, 4, 3]), ("long", [4, 4, 5])] {
        for (rank, rows) in rows.into_iter().enumerate() {
            let record = on_rank(meta(name, 0, rows), rank as u32, 3, batch());
            put(&store, &record, &bytes_of(&record, rank as u8));
        }
    }
    store.finish(true);
    let found = sealed(dir.path(), "shard-00000");
    assert_eq!(found["short:forward:out@model0.step0.micro0.call0"].1, [11, 4]);
    for (rank, rows) in [4, 4, 5].into_iter().enumerate() {
        assert_eq!(found[&format!("long:forward:out@model0.step0.micro0.call0#rank{rank}")].1, [rows, 4]);
    }
    assert_sound(dir.path());
}

/// Two steps of two ranks, of which the second is not known to be one when the run is closed, or its first shard is.
#[test]
fn pieces_side_by_side_are_one_tensor_if_they_are_of_one_pass() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    store.job(&JobInfo { group: "1".into(), world: 2, ..JobInfo::default() });
    let groups = vec![Group { ranks: runs(&[0, 1]), begin: Some(0), since: 0, together: true }];
    let first = Pass {
        model: 0,
        step: 0,
        micro: 0,
        train: true,
        inference: false,
        signature: 1,
        among: (0, 1),
        reduces: false,
        groups,
    };
    for step in 0..2 {
        for rank in 0..2 {
            let record = on_rank(meta("m", step, 4), rank, 2, batch());
            put_untold(&store, &record, &bytes_of(&record, rank as u8));
        }
    }
    (0..2).for_each(|rank| store.passed(JobId::default(), rank, first.clone()));
    let mut second = Pass { step: 1, ..first };
    second.groups[0].begin = Some(4);
    store.passed(JobId::default(), 0, second.clone());
    assert_eq!(store.look().len(), 2);
    // Rank 1 was elsewhere.
    second.groups[0].begin = Some(6);
    store.passed(JobId::default(), 1, second);
    assert_eq!(store.finish(false).len(), 2);
    let found = sealed(dir.path(), "shard-00000");
    let shape = |name: &str| found.get(name).map(|found| found.1.clone());
    assert_eq!(shape("m:forward:out@model0.step0.micro0.call0"), Some(vec![8, 4]));
    assert_eq!(shape("m:forward:out@model0.step1.micro0.call0"), None);
    for rank in 0..2 {
        assert_eq!(shape(&format!("m:forward:out@model0.step1.micro0.call0#rank{rank}")), Some(vec![4, 4]));
    }
    assert_eq!(store.totals().records, 3, "one that both made, and one of each");
    assert_sound(dir.path());
}

#[test]
fn equal_replicas_share_their_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    let bytes = bytes_of(&meta("w", 0, 64), 9);
    let mut places = Vec::new();
    for rank in 0..3 {
        let (part, against) = put(&store, &on_rank(meta("w", 0, 64), rank, 3, Placement::Replicate), &bytes);
        assert_eq!(against, None);
        places.push(part.at.unwrap());
    }
    assert!(places.windows(2).all(|w| w[0] == w[1]));
    assert_eq!(store.totals().bytes, bytes.len() as u64);
    assert_eq!((store.totals().records, store.totals().parts), (1, 3));
    store.finish(true);
    assert_eq!(sealed(dir.path(), "shard-00000")["w:forward:out@model0.step0.micro0.call0"].2, bytes);
}

#[test]
fn equal_replicas_in_pieces_share_their_bytes_too() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    let bytes = bytes_of(&meta("w", 0, 64), 9);
    let mut places = Vec::new();
    for rank in 0..2 {
        let mut part = store.begin(JobId::default(), on_rank(meta("w", 0, 64), rank, 2, Placement::Replicate));
        part.write(0, &bytes[..100]);
        part.write(100, &bytes[100..]);
        let Outcome::Stored(told) = part.finish() else { panic!() };
        places.push(part_of(told).at.unwrap());
    }
    assert_eq!(places[0], places[1]);
    put(&store, &meta("next", 0, 4), &[7; 64]);
    store.finish(true);
    assert_sound(dir.path());
    assert_eq!(sealed(dir.path(), "shard-00000").len(), 2);
}

#[test]
fn an_equal_replica_that_came_in_pieces_gives_back_its_own_bytes_and_nobody_elses() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    std::thread::scope(|threads| {
        for rank in 0..4 {
            let store = &store;
            threads.spawn(move || {
                for step in 0..25 {
                    let record = on_rank(meta("same", step, 4096), rank, 4, Placement::Replicate);
                    let bytes = bytes_of(&record, step as u8);
                    let (head, tail) = bytes.split_at(1000);
                    let mut part = store.begin(JobId::default(), record);
                    part.write(0, head);
                    put(store, &meta(&format!("other{rank}"), step, 512), &vec![rank as u8 + 1; 8192]);
                    part.write(1000, tail);
                    assert!(matches!(part.finish(), Outcome::Stored(told) if told.len() == 1));
                }
            });
        }
    });
    // Before it is sealed, which fills what is free.
    let kept =
        512 * std::os::unix::fs::MetadataExt::blocks(&fs::metadata(dir.path().join("shard-00000.open")).unwrap());
    let needed = (1 << 20) + 25 * 65536 + 4 * 25 * 8192;
    assert!(kept < needed * 3 / 2, "{kept} bytes on disk for {needed}");
    store.finish(true);
    assert_sound(dir.path());
}

#[test]
fn of_a_checksum_and_bytes_that_differ_it_is_the_checksum_that_is_apart() {
    for checksum_first in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        let store = store(dir.path());
        let bytes = on_rank(meta("w", 0, 8), 0, 2, Placement::Replicate);
        let mut checksum = on_rank(meta("w", 0, 8), 1, 2, Placement::Replicate);
        checksum.same = Some(7);
        let mut all = [(&bytes, bytes_of(&bytes, 0)), (&checksum, Vec::new())];
        if checksum_first {
            all.reverse();
        }
        all.iter().for_each(|(record, bytes)| drop(put(&store, record, bytes)));
        store.finish(true);
        let divergences: Vec<_> = lines(dir.path())
            .into_iter()
            .filter_map(|l| if let Line::Divergence { what, against } = l { Some((what.rank, against)) } else { None })
            .collect();
        assert_eq!(divergences, [(1, 0)], "checksum first: {checksum_first}");
    }
}

#[test]
fn replicas_that_differ_are_both_kept_and_reported() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    for rank in 0..3 {
        let record = on_rank(meta("w", 0, 8), rank, 3, Placement::Replicate);
        let (_, against) = put(&store, &record, &bytes_of(&record, u8::from(rank == 1)));
        assert_eq!(against, (rank == 1).then_some(0));
    }
    store.finish(true);
    let divergences: Vec<_> = lines(dir.path())
        .into_iter()
        .filter_map(|l| if let Line::Divergence { what, against } = l { Some((what.rank, against)) } else { None })
        .collect();
    assert_eq!(divergences, [(1, 0)]);
    assert_eq!(store.totals().divergences, 1);
    let found = sealed(dir.path(), "shard-00000");
    assert_eq!(found.keys().filter(|k| k.contains("#rank")).count(), 2);
    assert_sound(dir.path());
}

#[test]
fn a_batch_of_one_that_is_equal_everywhere_is_the_whole() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    for rank in 0..2 {
        let same = on_rank(meta("same", 0, 1), rank, 2, Placement::ReplicateOrShard { dim: 0 });
        put(&store, &same, &bytes_of(&same, 0));
        let other = on_rank(meta("other", 0, 1), rank, 2, Placement::ReplicateOrShard { dim: 0 });
        put(&store, &other, &bytes_of(&other, rank as u8));
    }
    store.finish(true);
    let found = sealed(dir.path(), "shard-00000");
    assert_eq!(found["same:forward:out@model0.step0.micro0.call0"].1, [1, 4]);
    assert_eq!(found["other:forward:out@model0.step0.micro0.call0"].1, [2, 4]);
}

#[test]
fn every_element_type_and_every_odd_shape_opens() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    for (n, &dtype) in DType::ALL.iter().enumerate() {
        let mut record = meta(dtype.name(), 0, 0);
        record.dtype = dtype;
        for (call, shape) in [vec![], vec![3], vec![0], vec![2, 0, 5], vec![1, 3, 1]].into_iter().enumerate() {
            (record.shape, record.call) = (shape, call as u32);
            put(&store, &record, &bytes_of(&record, n as u8));
        }
    }
    store.finish(true);
    let found = sealed(dir.path(), "shard-00000");
    assert_eq!(found.len(), DType::ALL.len() * 5);
    let (dtype, shape, _) = &found["complex128:forward:out@model0.step0.micro0.call1"];
    assert_eq!((dtype.as_str(), shape.as_slice()), ("U8", &[3, 16][..]));
    let file = fs::read(dir.path().join("shard-00000.safetensors")).unwrap();
    let (_, header) = SafeTensors::read_metadata(&file).unwrap();
    let metadata = header.metadata().as_ref().unwrap();
    assert_eq!(metadata["flexmodel.dtype.complex128:forward:out@model0.step0.micro0.call1"], "complex128");
    assert_sound(dir.path());
}

#[test]
fn shards_roll_when_full_and_late_pieces_still_find_their_place() {
    let dir = tempfile::tempdir().unwrap();
    let (store, notices) = store_with(dir.path(), 64 << 10);
    let piece = |rank| on_rank(meta("late", 0, 64), rank, 2, batch());
    put(&store, &piece(0), &bytes_of(&piece(0), 0));
    for step in 0..100 {
        put(&store, &meta("fill", step, 64), &[1; 1024]);
        if step == 80 {
            put(&store, &piece(1), &bytes_of(&piece(1), 1));
        }
    }
    store.finish(true);
    assert!(dir.path().join("shard-00001.safetensors").exists());
    assert_eq!(sealed(dir.path(), "shard-00000")["late:forward:out@model0.step0.micro0.call0"].1, [128, 4]);
    assert_sound(dir.path());
    assert_eq!(*notices.lock().unwrap(), [""; 0]);
    assert!(!fs::read_dir(dir.path()).unwrap().any(|e| e.unwrap().path().extension().is_some_and(|e| e == "open")));
}

#[test]
fn a_shard_rolls_before_its_header_overflows() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    let long = format!("{}\u{1}\"", "m".repeat(3000));
    for step in 0..400 {
        put(&store, &meta(&long, step, 1), &[2; 16]);
    }
    store.finish(true);
    let all: usize = (0..4)
        .filter(|n| shard::sealed_path(dir.path(), *n).exists())
        .map(|n| sealed(dir.path(), &shard::stem(n)).len())
        .sum();
    assert_eq!(all, 400);
    assert!(shard::sealed_path(dir.path(), 1).exists());
}

#[test]
fn statistics_only_keeps_no_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    let mut record = meta("s", 0, 10);
    record.stats_only = true;
    let (part, _) = put(&store, &record, &bytes_of(&record, 0));
    assert_eq!((part.at, part.stats.unwrap().count), (None, 40));
    store.finish(true);
    assert!(!shard::sealed_path(dir.path(), 0).exists());
}

#[test]
fn pieces_that_do_not_follow_each_other_are_a_counted_loss() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    let record = meta("x", 0, 8);
    for offsets in [&[(0, 64), (32, 64)][..], &[(64, 64)], &[(0, 64)], &[(0, 64), (64, 65)]] {
        let mut part = store.begin(JobId::default(), record.clone());
        for &(offset, len) in offsets {
            part.write(offset, &[0; 65][..len]);
        }
        assert!(matches!(part.finish(), Outcome::Lost), "{offsets:?}");
    }
    assert_eq!((store.totals().dropped, store.totals().parts), (4, 0));
    let (part, _) = put(&store, &record, &bytes_of(&record, 0));
    assert_eq!(part.at.unwrap().offset, crate::format::HEADER_SPACE, "the places of lost parts were not given back");
    store.finish(true);
    assert_sound(dir.path());
}

#[test]
fn a_part_that_is_never_finished_holds_up_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = store_with(dir.path(), 4096);
    let mut abandoned = store.begin(JobId::default(), on_rank(meta("gone", 0, 8), 1, 2, batch()));
    abandoned.write(0, &[1; 64]);
    for step in 0..20 {
        put(&store, &meta("a", step, 64), &[1; 1024]);
    }
    drop(abandoned);
    store.finish(true);
    assert_sound(dir.path());
    assert_eq!(parts(dir.path()).len(), 20);
    assert!(!shard::open_path(dir.path(), 0).exists());
}

#[test]
fn threads_of_many_ranks_write_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let (store, notices) = store_with(dir.path(), 256 << 10);
    std::thread::scope(|scope| {
        for rank in 0..4u32 {
            let store = &store;
            scope.spawn(move || {
                for step in 0..50 {
                    let record = on_rank(meta("m", step, 33), rank, 4, batch());
                    put(store, &record, &bytes_of(&record, rank as u8));
                }
            });
        }
    });
    store.finish(true);
    assert_sound(dir.path());
    assert_eq!((store.totals().records, store.totals().parts), (50, 200));
    assert_eq!(*notices.lock().unwrap(), [""; 0]);
    let sealed_lines = lines(dir.path()).iter().filter(|l| matches!(l, Line::Sealed { .. })).count();
    for n in 0..sealed_lines as u32 {
        sealed(dir.path(), &shard::stem(n));
    }
    assert_eq!(
        sealed_lines,
        fs::read_dir(dir.path())
            .unwrap()
            .filter(|e| e.as_ref().unwrap().path().extension().is_some_and(|e| e == "safetensors"))
            .count()
    );
}
