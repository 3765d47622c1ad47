use std::{fs, io::Write, path::PathBuf, sync::Arc};

use proptest::prelude::*;
use wire::{
    dtype::DType,
    record::{Axis, Placement},
};

use super::*;
use crate::{
    format::{FORMAT, JobId, JobInfo, Line, MANIFEST_FILE, Owners, RUN_FILE, RunInfo},
    manifest::encode_line,
    read::{AssemblyPlan, fill},
    testing::fixture::*,
};

#[test]
fn what_has_come_since_is_read_and_what_was_taken_stays() {
    let mut f = Fixture::default();
    f.part(id("mlp", 0), DType::UInt8, &[1], 0, dp(0, 2, shard(0)), &[1]);
    let lines = f.lines.clone();
    f.part(id("mlp", 0), DType::UInt8, &[1], 1, dp(1, 2, shard(0)), &[2]);
    let all = f.lines.clone();
    let dir = f.kill();
    let manifest = dir.path().join(MANIFEST_FILE);
    fs::write(&manifest, &lines).unwrap();
    let mut growing = Growing::open(dir.path()).unwrap();
    let before = growing.run();
    assert_eq!(growing.refresh().unwrap(), 0);
    assert!(Arc::ptr_eq(&before, &growing.run()), "nothing was read again");
    fs::write(&manifest, &all[..all.len() - 5]).unwrap();
    assert_eq!(growing.refresh().unwrap(), 0, "half a line is none");
    fs::write(&manifest, &all).unwrap();
    assert_eq!(growing.refresh().unwrap(), 1);
    assert_eq!(growing.run().records[0].shape().unwrap(), [2]);
    assert!(before.records[0].shape().is_err());
    fs::write(&manifest, &lines).unwrap();
    assert_eq!(growing.refresh().unwrap(), 1, "a run written anew");
    assert_same(&growing, dir.path());
}

#[test]
fn a_refresh_reads_what_was_appended_and_shares_the_records_that_are_as_they_were() {
    let mut f = Fixture::default();
    for step in 0..200 {
        f.part(id("mlp", step), DType::UInt8, &[1], 0, Vec::new(), &[1]);
    }
    let lines = f.lines.clone();
    let dir = f.kill();
    let ends: Vec<usize> = (0..lines.len()).filter(|&at| lines[at] == b'\n').map(|at| at + 1).collect();
    let manifest = dir.path().join(MANIFEST_FILE);
    fs::write(&manifest, &lines[..ends[99]]).unwrap();
    let mut growing = Growing::open(dir.path()).unwrap();
    assert_eq!(growing.read(), ends[99] as u64);
    let first = growing.run();
    for (from, to) in (99..).step_by(20).zip(ends[100..].chunks(20).map(|chunk| chunk[chunk.len() - 1])) {
        let before = growing.read();
        append(&manifest, &lines[ends[from]..to]);
        growing.refresh().unwrap();
        assert_eq!(growing.read() - before, (to - ends[from]) as u64);
    }
    let last = growing.run();
    assert_eq!(last.records.len(), 200);
    assert!(first.records.iter().zip(&last.records).all(|(one, other)| Arc::ptr_eq(one, other)));
    // Half a line is read again, and no more.
    let before = growing.read();
    for byte in b"{\"crc" {
        append(&manifest, &[*byte]);
        growing.refresh().unwrap();
    }
    assert_eq!(growing.read() - before, 1 + 2 + 3 + 4 + 5);
    assert_same(&growing, dir.path());
}

#[test]
fn a_record_that_is_kept_keeps_no_other() {
    let mut f = Fixture::default();
    for step in 0..2 {
        f.part(id("mlp", step), DType::UInt8, &[1], 0, Vec::new(), &[1]);
    }
    let dir = f.kill();
    let growing = Growing::open(dir.path()).unwrap();
    let run = growing.run();
    let (record, source, other) = (run.records[0].clone(), run.source().clone(), Arc::downgrade(&run.records[1]));
    drop((run, growing));
    assert!(other.upgrade().is_none());
    let plan = AssemblyPlan::new(&record.parts).unwrap();
    assert_eq!(&*fill::own(&plan, source.shards()).unwrap(), [1]);
}

#[test]
fn a_manifest_that_is_another_is_read_anew() {
    let of = |module: &str, steps: u64| {
        let mut f = Fixture::default();
        (0..steps).for_each(|step| f.part(id(module, step), DType::UInt8, &[1], 0, Vec::new(), &[1]));
        f
    };
    let dir = of("one", 3).kill();
    let manifest = dir.path().join(MANIFEST_FILE);
    let mut growing = Growing::open(dir.path()).unwrap();
    // In its place, and longer; of the same length, written over; another file; gone; there again; cut.
    fs::write(&manifest, of("two", 5).lines).unwrap();
    growing.refresh().unwrap();
    assert_same(&growing, dir.path());
    let mut damaged = of("two", 5).lines;
    damaged[40] ^= 1;
    fs::write(&manifest, damaged).unwrap();
    growing.refresh().unwrap();
    assert_eq!(growing.run().problems.len(), 1);
    fs::write(dir.path().join("new"), of("two", 7).lines).unwrap();
    fs::rename(dir.path().join("new"), &manifest).unwrap();
    assert_eq!(growing.refresh().unwrap(), 3);
    assert_same(&growing, dir.path());
    fs::remove_file(&manifest).unwrap();
    assert!(growing.refresh().is_err(), "there are shards");
    assert_eq!(growing.run().records.len(), 7, "what was read stays");
    fs::write(&manifest, of("two", 2).lines).unwrap();
    growing.refresh().unwrap();
    assert_same(&growing, dir.path());
    fs::write(&manifest, "").unwrap();
    growing.refresh().unwrap();
    assert_same(&growing, dir.path());
}

#[test]
fn a_run_that_is_over_is_read_anew_if_it_goes_on_all_the_same() {
    let mut f = Fixture::default();
    f.part(id("mlp", 0), DType::UInt8, &[1], 0, Vec::new(), &[1]);
    let dir = f.finish();
    let mut growing = Growing::open(dir.path()).unwrap();
    assert_eq!(growing.refresh().unwrap(), 0);
    let mut more = Fixture::default();
    more.part(id("mlp", 1), DType::UInt8, &[1], 0, Vec::new(), &[1]);
    append(&dir.path().join(MANIFEST_FILE), &more.lines);
    assert_eq!(growing.refresh().unwrap(), 1);
    assert_same(&growing, dir.path());
}

#[test]
fn a_node_that_comes_is_read_too() {
    let dir = tempfile::tempdir().unwrap();
    let node = |name: &str, rank: u32| {
        let mut f = Fixture::default();
        f.part(id("mlp", 0), DType::UInt8, &[1], rank, dp(rank, 3, shard(0)), &[1]);
        fs::rename(f.kill().keep(), dir.path().join(name)).unwrap();
    };
    node("a", 0);
    node("b", 1);
    let mut growing = Growing::open(dir.path()).unwrap();
    node("c", 2);
    assert_eq!(growing.refresh().unwrap(), 1);
    assert_same(&growing, dir.path());
    node("d", 2);
    assert!(growing.refresh().err().unwrap().to_string().contains("c and d both have rank 2"));
}

fn append(path: &Path, bytes: &[u8]) {
    fs::File::options().append(true).open(path).unwrap().write_all(bytes).unwrap();
}

/// What was read on is what is read anew.
fn assert_same(growing: &Growing, path: &Path) {
    let (one, other) = (growing.run(), Run::open(path).unwrap());
    assert_eq!((&one.path, &one.nodes, &one.info, &one.jobs), (&other.path, &other.nodes, &other.info, &other.jobs));
    assert_eq!(one.revisions, other.revisions);
    let records = |run: &Run| run.records.iter().map(|r| (r.id.clone(), r.parts.clone())).collect::<Vec<_>>();
    assert_eq!(records(&one), records(&other));
    assert_eq!((&one.lost, &one.sealed), (&other.lost, &other.sealed));
    assert_eq!((&one.problems, &one.notes), (&other.problems, &other.notes));
    assert_eq!(one.shard_problems(), other.shard_problems());
    for axis in [("dp", 0), ("dp", 1), ("tp", 0), ("tp", 1)] {
        let place = vec![(axis.0.to_owned(), axis.1, 2)];
        assert_eq!(one.source().rank_at(&place), other.source().rank_at(&place), "{axis:?}");
    }
}

/// A line of a manifest: parts of some modules on one of two ranks, also again, and all else that there is.
fn line(node: u32) -> impl Strategy<Value = Vec<u8>> {
    let part = (0..3u8, 0..3u64, 0..2u32, 0..4u8, 0..2u32).prop_map(move |(module, step, index, how, job)| {
        let rank = 2 * node + index;
        let axis = |name: &str, index, place| Axis { name: name.into(), index, size: 2, place, input_digest: None };
        let axes = match how {
            0 => vec![axis("dp", node, Placement::Replicate), axis("tp", index, shard(0))],
            1 => vec![axis("dp", node, shard(0)), axis("tp", index, Placement::Replicate)],
            _ => vec![axis("dp", node, Placement::Replicate), axis("tp", index, Placement::Replicate)],
        };
        let mut part = crate::testing::part(&format!("m{module}"), step, 1);
        (part.what.rank, part.what.axes, part.what.id.job.job) = (rank, axes, job);
        if how == 3 {
            part.same = part.at.take().map(|at| at.crc);
        }
        encode_line(&Line::Part(part))
    });
    let what = move || crate::format::What::from_meta(crate::testing::meta("m1", 0, 1));
    prop_oneof![
        12 => part,
        1 => (0..2u32, 0..3u8).prop_map(|(job, group)| {
            let id = JobId { job, attempt: 0 };
            encode_line(&Line::Job(JobInfo { id, group: format!("{group}"), world: 4, ..JobInfo::default() }))
        }),
        1 => (0..2u32, 1..4u64).prop_map(move |(job, number)| {
            let told = crate::testing::revision(JobId { job, attempt: 0 }, number, u64::from(node), &["a"]);
            encode_line(&Line::Revision(told))
        }),
        1 => Just(encode_line(&Line::Refused { what: what(), reason: "why".into() })),
        1 => Just(encode_line(&Line::Divergence { what: what(), against: 1 })),
        1 => Just(encode_line(&Line::Dropped { rank: 2 * node, count: 1, reason: "slow".into(), from: None })),
        1 => (0..9u64).prop_map(|len| encode_line(&Line::Sealed { shard: "shard-00000".into(), len })),
        1 => Just(b"{\"crc\":\"no line\"}\n".to_vec()),
        1 => Just(b"\n".to_vec()),
    ]
}

fn info(known: u8) -> RunInfo {
    let owners = |ranks: &[u32], modules: &[&str]| Owners {
        job: JobId::default(),
        model: Some(0),
        ranks: ranks.to_vec(),
        modules: Arc::new(modules.iter().map(|&name| name.into()).collect()),
    };
    let mut info = RunInfo { format: FORMAT, world: 4, ..RunInfo::default() };
    if known > 0 {
        info.owners = vec![owners(&[0, 1], &["m0", "m1"]), owners(&[2, 3], &["m0", "m2"])];
    }
    info.finished_ns = (known > 1).then_some(1);
    info
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn after_every_step_a_run_that_grew_is_as_one_that_is_opened(
        manifests in (proptest::collection::vec(line(0), 0..30), proptest::collection::vec(line(1), 0..30)),
        cuts in proptest::collection::vec((0..=100usize, 0..=100usize, 0..3u8), 1..8),
        nodes: bool,
    ) {
        let dir = tempfile::tempdir().unwrap();
        let (one, other) = (manifests.0.concat(), manifests.1.concat());
        let folders: Vec<(PathBuf, Vec<u8>)> = match nodes {
            true => vec![(dir.path().join("a"), one), (dir.path().join("b"), other)],
            false => vec![(dir.path().to_owned(), [one, other].concat())],
        };
        let write_info = |known: u8| for (path, _) in &folders {
            fs::write(path.join("new"), serde_json::to_vec(&info(known)).unwrap()).unwrap();
            fs::rename(path.join("new"), path.join(RUN_FILE)).unwrap();
        };
        for (path, _) in &folders {
            fs::create_dir_all(path).unwrap();
            fs::write(path.join(MANIFEST_FILE), "").unwrap();
        }
        write_info(0);
        let mut growing = Growing::open(dir.path()).unwrap();
        let (mut written, mut known) = (vec![0; folders.len()], 0);
        for (first, second, info) in cuts.into_iter().chain([(100, 100, 2)]) {
            for (number, (path, all)) in folders.iter().enumerate() {
                let to = all.len() * [first, second][number] / 100;
                if to > written[number] {
                    append(&path.join(MANIFEST_FILE), &all[written[number]..to]);
                    written[number] = to;
                }
            }
            if info > known {
                known = info;
                write_info(known);
            }
            growing.refresh().unwrap();
            assert_same(&growing, dir.path());
        }
    }
}
