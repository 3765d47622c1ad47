use wire::{
    dtype::DType,
    hooks::Kind,
    passes::{Group, Pass, runs},
    record::Placement,
};

use crate::{
    Run,
    format::{Identity, JobId, Line},
    testing::fixture::*,
};

/// A pass of one of two ranks that trains, and what came of a parameter in it.
fn tell(f: &mut Fixture, rank: u32, micro: u32, reduces: bool, kind: Kind, place: Placement, byte: u8) {
    let id = Identity { kind, micro: if kind == Kind::Param { 0 } else { micro }, train: true, ..id("w", 0) };
    f.part(id, DType::UInt8, &[1], rank, dp(rank, 2, place), &[byte]);
    // The byte tells the pass of a gradient.
    let clock = if kind == Kind::Param || !reduces { 0 } else { u64::from(byte) };
    let group = Group { ranks: runs(&[0, 1]), begin: Some(clock), since: 0, together: false };
    let (model, signature, among) = (0, 1, (0, 1));
    let pass =
        Pass { model, step: 0, micro, train: true, inference: false, signature, among, reduces, groups: vec![group] };
    f.line(&Line::Pass { job: JobId::default(), rank, pass });
}

#[test]
fn what_a_backward_pass_left_is_of_one_forward_pass() {
    let mut f = Fixture::default();
    let mut left = |rank, micro, reduces, byte| {
        tell(&mut f, rank, micro, reduces, Kind::GradUnclipped, Placement::Replicate, byte);
    };
    // Rank 0 alone first, so that its passes have other numbers than those of rank 1.
    left(0, 0, false, 7);
    for byte in [1, 2] {
        left(0, u32::from(byte), true, byte);
        left(1, u32::from(byte) - 1, true, byte);
    }
    let dir = f.finish();
    let run = Run::open(dir.path()).unwrap();
    let bytes = |at: usize| {
        let record = &run.records[at];
        record.parts.iter().map(|part| run.shards().part(part).unwrap()[0]).collect::<Vec<u8>>()
    };
    let mut found: Vec<_> = (0..run.records.len()).map(|at| (run.records[at].id.micro, bytes(at))).collect();
    found.sort();
    assert_eq!(found, [(0, vec![7]), (1, vec![1, 1]), (2, vec![2, 2])]);
    assert!(run.lost.divergences.is_empty());
}

#[test]
fn a_parameter_that_one_rank_took_earlier_is_whole_where_ranks_have_the_same() {
    for (other, is_whole) in [(1, true), (2, false)] {
        let mut f = Fixture::default();
        tell(&mut f, 0, 0, true, Kind::Param, Placement::Replicate, 1);
        tell(&mut f, 1, 0, true, Kind::Param, Placement::Unknown, other);
        let dir = f.finish();
        let run = Run::open(dir.path()).unwrap();
        assert_eq!(run.records[0].shape().is_ok(), is_whole && run.records.len() == 1);
    }
}
