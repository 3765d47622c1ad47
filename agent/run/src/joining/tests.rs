use wire::{
    passes::{Group, runs},
    record::Placement,
};

use super::*;
use crate::testing::{fixture::id, meta, on_rank};

const WORLD: u32 = 2;

/// A pass of a model that all ranks have; `begin` counts the collectives before it.
fn pass(step: u64, micro: u32, train: bool, begin: u64, together: bool) -> Pass {
    let groups = vec![Group { ranks: runs(&[0, 1]), begin: Some(begin), since: 0, together }];
    Pass { model: 0, step, micro, train, inference: false, signature: 1, among: (0, 1), reduces: false, groups }
}

fn part(step: u64, micro: u32, train: bool, rank: u32) -> Told {
    let what = What { id: Identity { micro, train, ..id("mlp", step) }, ..what(rank) };
    Told::part(Part { what, at: None, stats: None, same: None })
}

fn what(rank: u32) -> What {
    What::from_meta(on_rank(meta("mlp", 0, 1), rank, WORLD, Placement::Shard { dim: 0 }))
}

/// Of a job with a process group.
fn joining() -> Joining {
    let mut joining = Joining::default();
    joining.job(&JobInfo { group: "1".into(), world: WORLD, ..JobInfo::default() });
    joining
}

/// Ranks and what their parts are said to be of.
fn said(told: Vec<Told>) -> Vec<(u32, u32, Option<u32>)> {
    let one = |told| match told {
        Told::Part { part, only } => {
            assert_eq!(part.what.id.apart, only.and_then(|only| only.first().copied()));
            (part.what.rank, part.what.id.micro, part.what.id.apart)
        }
        Told::Differs { what, against } => panic!("{} differs from that of rank {against}", what.id),
    };
    told.into_iter().map(one).collect()
}

#[test]
fn a_part_waits_until_it_is_known_of_which_pass_it_is() {
    let mut joining = joining();
    for rank in 0..WORLD {
        assert!(joining.tell(part(0, 0, true, rank)).is_empty());
    }
    joining.passed(JobId::default(), 0, &pass(0, 0, true, 5, true));
    assert!(joining.look().is_empty());
    joining.passed(JobId::default(), 1, &pass(0, 0, true, 5, true));
    assert_eq!(said(joining.look()), [(0, 0, None), (1, 0, None)]);
    // What comes later of the same pass need not wait.
    assert_eq!(said(joining.tell(part(0, 0, true, 1))), [(1, 0, None)]);
}

#[test]
fn what_one_rank_made_alone_is_told_of_as_its_own_and_the_others_rows_are_not_mixed_in() {
    let mut joining = joining();
    joining.passed(JobId::default(), 0, &pass(0, 0, true, 5, false));
    joining.passed(JobId::default(), 0, &pass(0, 1, true, 5, true));
    joining.passed(JobId::default(), 1, &pass(0, 0, true, 5, true));
    let parts = [(0, 0), (0, 1), (1, 0)];
    parts.iter().for_each(|&(rank, micro)| assert!(joining.tell(part(0, micro, true, rank)).is_empty()));
    assert_eq!(said(joining.look()), [(0, 1, None), (1, 1, None)]);
    for rank in 0..WORLD {
        joining.passed(JobId::default(), rank, &pass(1, 0, true, 9, true));
    }
    assert_eq!(said(joining.look()), [(0, 0, Some(0))]);
}

#[test]
fn parts_of_two_passes_may_differ() {
    let mut joining = joining();
    let differs = || Told::Differs { what: Box::new(what(1)), against: 0 };
    assert!(joining.tell(differs()).is_empty());
    joining.passed(JobId::default(), 0, &pass(0, 0, true, 5, false));
    joining.passed(JobId::default(), 1, &pass(0, 0, true, 6, true));
    assert!(joining.look().is_empty());
    joining.passed(JobId::default(), 0, &pass(0, 1, true, 6, true));
    (0..WORLD).for_each(|rank| joining.passed(JobId::default(), rank, &pass(1, 0, true, 9, true)));
    assert!(joining.look().is_empty() && joining.end(false).is_empty());

    joining.passed(JobId::default(), 0, &pass(2, 0, true, 11, true));
    joining.passed(JobId::default(), 1, &pass(2, 0, true, 11, true));
    assert!(joining.look().is_empty());
    let one = Told::Differs { what: Box::new(What { id: id("mlp", 2), ..what(1) }), against: 0 };
    assert!(matches!(joining.tell(one)[..], [Told::Differs { against: 0, .. }]));
}

#[test]
fn ranks_without_a_process_group_are_joined_by_number_at_once() {
    let mut joining = Joining::default();
    joining.job(&JobInfo { world: WORLD, ..JobInfo::default() });
    assert_eq!(said(joining.tell(part(0, 0, true, 1))), [(1, 0, None)]);
}

#[test]
fn a_node_does_not_wait_for_the_ranks_of_others() {
    let mut joining = joining();
    joining.job(&JobInfo { here: runs(&[1]), ..JobInfo::default() });
    assert!(joining.tell(part(0, 0, true, 1)).is_empty());
    joining.passed(JobId::default(), 1, &pass(0, 0, true, 5, true));
    assert_eq!(said(joining.look()), [(1, 0, None)]);
}

#[test]
fn nothing_waits_without_a_bound_and_what_was_forgotten_is_its_own_ranks() {
    let mut joining = joining();
    let (mut told, mut steps) = (Vec::new(), 0);
    while told.is_empty() {
        told = joining.tell(part(steps, 0, true, 0));
        steps += 1;
        assert!(joining.bytes <= MAX_WAITING);
    }
    assert!(joining.bytes <= MAX_WAITING / 2 && !joining.waiting.is_empty());
    assert!(said(told).iter().all(|said| *said == (0, 0, Some(0))));
    for step in 0..NEWEST as u64 + 10 {
        joining.passed(JobId::default(), 0, &pass(step, 0, true, step, true));
    }
    assert!(joining.look().is_empty());
    assert!(joining.jobs.values().all(|job| job.passes.len() == NEWEST));
    joining.passed(JobId::default(), 1, &pass(0, 0, true, 0, true));
    assert!(joining.look().is_empty());
    assert!(said(joining.end(false)).iter().all(|said| *said == (0, 0, Some(0))));
    assert_eq!(joining.bytes, 0);
}

/// More parts come between two looks than may wait.
#[test]
fn what_is_known_when_room_is_needed_is_told_as_what_it_is() {
    let mut joining = joining();
    let (mut told, mut step) = (Vec::new(), 0);
    while told.is_empty() {
        (0..WORLD).for_each(|rank| told.extend(joining.tell(part(step, 0, true, rank))));
        if step < 4 {
            (0..WORLD).for_each(|rank| joining.passed(JobId::default(), rank, &pass(step, 0, true, step, true)));
        }
        step += 1;
    }
    let alone = said(told).iter().filter(|(.., apart)| apart.is_some()).count();
    assert!(alone > 0, "most are not known");
    let mut joining = self::joining();
    let mut told = Vec::new();
    for step in 0..step {
        for rank in 0..WORLD {
            told.extend(joining.line(Line::Pass {
                job: JobId::default(),
                rank,
                pass: pass(step, 0, true, step, true),
            }));
            told.extend(joining.tell(part(step, 0, true, rank)));
        }
    }
    told.extend(joining.end(true));
    assert!(said(told).iter().all(|(.., apart)| apart.is_none()), "all of these are");
}

#[test]
fn ranks_that_nobody_hears_of_are_not_waited_for_for_ever() {
    let mut joining = joining();
    assert!(joining.tell(part(0, 0, true, 0)).is_empty());
    joining.passed(JobId::default(), 0, &pass(0, 0, true, 0, true));
    let looks = (0..2 * PATIENCE).map(|_| joining.look()).take_while(Vec::is_empty).count();
    assert_eq!(looks, PATIENCE as usize + 1);
    assert_eq!(said(joining.tell(part(0, 0, true, 0))), [(0, 0, None)]);
    // What other nodes' ranks have gathered here goes by its numbers.
    assert_eq!(said(joining.tell(part(0, 0, true, 1))), [(1, 0, None)]);
}

#[test]
fn pieces_of_two_passes_are_not_one_in_a_file() {
    let mut joining = joining();
    let of = |micro, rank| {
        let Told::Part { part, .. } = part(0, micro, true, rank) else { panic!() };
        Place::of(&part.what)
    };
    joining.passed(JobId::default(), 0, &pass(0, 0, true, 5, true));
    assert!(joining.look().is_empty());
    assert!(!joining.are_one([of(0, 0), of(0, 1)].into_iter()), "rank 1 has not told of any");
    joining.passed(JobId::default(), 1, &pass(0, 0, true, 5, true));
    assert!(joining.look().is_empty());
    assert!(joining.are_one([of(0, 0), of(0, 1)].into_iter()));
    assert!(!joining.are_one([of(0, 0), of(1, 1)].into_iter()));
    assert!(Joining::default().are_one([of(0, 0), of(1, 1)].into_iter()), "nothing but numbers is known");
}

#[test]
fn a_manifest_tells_the_same_and_is_looked_at_now_and_then() {
    let mut joining = Joining::default();
    joining.job(&JobInfo { group: "1".into(), world: WORLD, ..JobInfo::default() });
    let (mut told, steps) = (Vec::new(), LOOK as u64 - 10);
    for step in 0..steps {
        for rank in 0..WORLD {
            let Told::Part { part, .. } = part(step, 0, true, rank) else { panic!() };
            told.extend(joining.line(Line::Part(*part)));
            let pass = pass(step, 0, true, step, true);
            told.extend(joining.line(Line::Pass { job: JobId::default(), rank, pass }));
        }
    }
    let before = told.len();
    assert!(before > 0);
    told.extend(joining.end(true));
    assert_eq!((told.len() > before, told.len() as u64), (true, steps * u64::from(WORLD)));
    assert!(said(told).iter().all(|(.., apart)| apart.is_none()));
}
