//! Tests of the live state.

use flexmodel_run::{
    format::{JobId, Line, Location, MANIFEST_FILE, Stats},
    manifest::encode_line,
    testing,
};
use wire::record::Placement;

use super::*;

fn stats(values: &[f32]) -> Stats {
    let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
    flexmodel_run::stats::compute(wire::dtype::DType::Float32, &bytes).unwrap()
}

/// The part of `rank` of `world` at `step`, with these elements.
fn part(step: u64, rank: u32, world: u32, place: Placement, values: &[f32]) -> Part {
    let what = What::from_meta(testing::on_rank(testing::meta("layers.0.mlp", step, 1), rank, world, place));
    let at = Location { shard: "shard-00000".into(), offset: 1 << 20, len: 4 * values.len() as u64, crc: 1 };
    Part { what, at: Some(at), stats: Some(stats(values)), same: None }
}

fn query() -> SeriesQuery {
    SeriesQuery { module: "layers.0.mlp".into(), ..SeriesQuery::default() }
}

fn close(a: Option<f64>, b: Option<f64>) -> bool {
    let (a, b) = (a.unwrap(), b.unwrap());
    (a - b).abs() <= 1e-9 * a.abs().max(1.0)
}

#[test]
fn the_parts_of_a_record_make_one_point_with_the_statistics_of_the_whole() {
    let live = Live::new(RunInfo::default());
    live.told(&Told::part(part(3, 0, 2, testing::batch(), &[1.0, 2.0, -7.5])));
    assert_eq!(live.series(&query()).1[0].points.complete, [false]);
    live.told(&Told::part(part(3, 1, 2, testing::batch(), &[10.0, 4.0])));
    let (_, series) = live.series(&query());
    let (points, whole) = (&series[0].points, stats(&[1.0, 2.0, -7.5, 10.0, 4.0]));
    assert_eq!((points.step.as_slice(), points.complete.as_slice()), ([3].as_slice(), [true].as_slice()));
    assert!(close(points.mean[0], whole.mean) && close(points.std[0], whole.std));
    assert!(close(points.l2[0], whole.l2) && close(points.absmax[0], whole.absmax));
    let totals = live.run().totals;
    assert_eq!((totals.records, totals.parts, totals.bytes), (1, 2, 20));
}

/// Rank 0 evaluates alone, under the numbers of what both make.
#[test]
fn what_some_ranks_made_alone_is_a_point_of_its_own() {
    let live = Live::new(RunInfo::default());
    let mut alone = part(3, 0, 2, testing::batch(), &[8.0]);
    alone.what.id.apart = Some(0);
    live.told(&Told::Part { part: Box::new(alone.clone()), only: Some([0].into()) });
    (0..2).for_each(|rank| live.told(&Told::part(part(3, rank, 2, testing::batch(), &[2.0]))));
    let (_, series) = live.series(&query());
    let points = &series[0].points;
    assert_eq!((&points.apart[..], &points.complete[..]), (&[None, Some(0)][..], &[true, true][..]));
    assert!(close(points.mean[0], Some(2.0)) && close(points.mean[1], Some(8.0)));
    let picked = live.pick(&alone.what.id).unwrap();
    assert_eq!((picked.parts.len(), picked.only), (1, Some([0].into())));
}

#[test]
fn replicas_count_once_in_whatever_order_they_come() {
    for place in [Placement::Replicate, Placement::ReplicateOrShard { dim: 0 }] {
        for order in [[0, 1], [1, 0]] {
            let live = Live::new(RunInfo::default());
            order.iter().for_each(|&rank| live.told(&Told::part(part(0, rank, 2, place.clone(), &[3.0, 4.0]))));
            let (_, series) = live.series(&query());
            assert!(close(series[0].points.l2[0], Some(5.0)), "{place:?} {order:?}");
        }
    }
}

#[test]
fn a_checksum_counts_as_the_replica_that_it_is() {
    for checksum_first in [false, true] {
        let live = Live::new(RunInfo::default());
        let bytes = part(0, 0, 2, Placement::Replicate, &[3.0, 4.0]);
        let mut checksum = part(0, 1, 2, Placement::Replicate, &[3.0, 4.0]);
        checksum.same = checksum.at.take().map(|at| at.crc);
        checksum.stats = None;
        let parts = if checksum_first { [&checksum, &bytes] } else { [&bytes, &checksum] };
        parts.iter().for_each(|part| live.told(&Told::part((*part).clone())));
        let (_, series) = live.series(&query());
        assert!(close(series[0].points.l2[0], Some(5.0)) && series[0].points.complete[0]);
        assert_eq!((series[0].summary.state.count, live.run().totals.records), (1, 1));
        assert_eq!(live.pick(&bytes.what.id).unwrap().parts, parts.map(Clone::clone));
    }
}

#[test]
fn parts_that_might_have_been_replicas_and_differ_are_pieces() {
    let live = Live::new(RunInfo::default());
    live.told(&Told::part(part(0, 0, 2, Placement::ReplicateOrShard { dim: 0 }, &[3.0])));
    live.told(&Told::part(part(0, 1, 2, Placement::ReplicateOrShard { dim: 0 }, &[4.0])));
    assert!(close(live.series(&query()).1[0].points.l2[0], Some(5.0)));
}

#[test]
fn a_slow_rank_joins_the_records_of_a_fast_one() {
    let live = Live::new(RunInfo::default());
    for rank in [0, 1] {
        for step in 0..50 {
            live.told(&Told::part(part(step, rank, 2, testing::batch(), &[step as f32])));
        }
    }
    let (_, series) = live.series(&query());
    assert_eq!(series[0].points.step, (0..50).collect::<Vec<_>>());
    assert!(series[0].points.complete.iter().all(|&c| c));
    assert_eq!(live.run().totals.records, 50);
    let id = part(7, 0, 2, testing::batch(), &[0.0]).what.id;
    assert_eq!(live.pick(&id).unwrap().parts.len(), 2);
}

#[test]
fn rings_keep_the_newest_and_nothing_more() {
    let live = Live::new(RunInfo::default());
    for step in 0..(MAX_RECORDS as u64 + 100) {
        live.told(&Told::part(part(step, 0, 1, testing::batch(), &[1.0])));
    }
    let (_, series) = live.series(&query());
    assert_eq!(series[0].points.step.len(), POINTS_PER_SERIES);
    assert_eq!(series[0].points.step.last(), Some(&(MAX_RECORDS as u64 + 99)));
    assert_eq!(series[0].summary.state.count, MAX_RECORDS as u64 + 100);
    let all = live.records(&query(), usize::MAX);
    assert_eq!(all.len(), MAX_RECORDS);
    assert_eq!(all[0].id.step, MAX_RECORDS as u64 + 99);
    assert!(live.pick(&part(0, 0, 1, testing::batch(), &[]).what.id).is_none());
}

#[test]
fn records_of_many_parts_are_bounded_by_their_parts() {
    let live = Live::new(RunInfo::default());
    let ranks = 512;
    for step in 0..(2 * MAX_PARTS as u64 / u64::from(ranks)) {
        (0..ranks).for_each(|rank| live.told(&Told::part(part(step, rank, ranks, testing::batch(), &[1.0]))));
    }
    assert_eq!(live.records(&query(), usize::MAX).len(), MAX_PARTS / ranks as usize);
}

#[test]
fn many_series_share_the_budget_of_points() {
    let live = Live::new(RunInfo::default());
    let mut one = part(0, 0, 1, testing::batch(), &[1.0]);
    for series in 0..(POINT_BUDGET / POINTS_PER_SERIES * 4) {
        one.what.id.module = format!("m{series}");
        for step in 0..600 {
            one.what.id.step = step;
            live.told(&Told::part(one.clone()));
        }
    }
    let inner = live.lock();
    assert!(inner.series.iter().map(|s| s.points.len()).sum::<usize>() <= POINT_BUDGET);
    assert!(inner.series.iter().all(|s| s.points.len() <= inner.limit()));
    assert!(inner.series.iter().all(|s| s.points.back().is_some_and(|p| p.at.step == 599)));
}

#[test]
fn every_changed_series_is_sent_even_when_few_fit() {
    let live = Live::new(RunInfo::default());
    let mut one = part(0, 0, 1, testing::batch(), &[1.0]);
    for series in 0..25 {
        one.what.id.module = format!("m{series}");
        live.told(&Told::part(one.clone()));
    }
    let (mut since, mut seen, mut sent) = (0, 0, std::collections::BTreeSet::new());
    for _ in 0..3 {
        let delta = live.delta(since, &mut seen, 10);
        assert!(delta.series.len() <= 10);
        since = delta.clock;
        sent.extend(delta.series.into_iter().map(|(id, _)| id));
    }
    assert_eq!(sent.len(), 25);
    assert!(live.delta(since, &mut seen, 10).series.is_empty());
}

#[test]
fn only_points_that_changed_are_sent_again() {
    let live = Live::new(RunInfo::default());
    (0..5).for_each(|step| live.told(&Told::part(part(step, 0, 2, testing::batch(), &[1.0]))));
    let (since, _) = live.series(&query());
    live.told(&Told::part(part(2, 1, 2, testing::batch(), &[2.0])));
    let (_, series) = live.series(&SeriesQuery { since, ..query() });
    assert_eq!(series[0].points.step, [2]);
}

#[test]
fn not_a_number_is_counted_and_leaves_the_rest_readable() {
    let live = Live::new(RunInfo::default());
    live.told(&Told::part(part(0, 0, 2, testing::batch(), &[f32::NAN, 3.0])));
    live.told(&Told::part(part(0, 1, 2, testing::batch(), &[4.0])));
    let (_, series) = live.series(&query());
    assert_eq!((series[0].points.bad[0], series[0].summary.state.bad), (1, 1));
    assert!(close(series[0].points.l2[0], Some(5.0)));
}

#[test]
fn the_state_follows_the_ranks_and_the_end() {
    let live = Live::new(RunInfo::default());
    assert_eq!(live.run().state, "waiting");
    live.attached(0, 10);
    assert_eq!(live.run().state, "live");
    live.left(0);
    assert_eq!(live.run().state, "idle");
    live.info(&RunInfo {
        finished_ns: Some(1),
        totals: Totals { records: 9, ..Totals::default() },
        ..RunInfo::default()
    });
    assert_eq!((live.run().state, live.run().totals.records), ("finished", 9));
}

#[test]
fn a_manifest_fills_the_state_as_the_ranks_did() {
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (part(0, 0, 2, testing::batch(), &[3.0]), part(0, 1, 2, testing::batch(), &[4.0]));
    let lines = [
        Line::Part(one.clone()),
        Line::Refused { what: one.what.clone(), reason: "sparse".into() },
        Line::Part(two.clone()),
        Line::Divergence { what: two.what.clone(), against: 0 },
        Line::Dropped { rank: 1, count: 5, reason: "the disk is full".into(), from: None },
        Line::Revision(testing::revision(JobId::default(), 1, 9, &["layers.*.mlp"])),
    ];
    let mut manifest: Vec<u8> = lines.iter().flat_map(encode_line).collect();
    manifest.extend_from_slice(b"damage\n");
    manifest.extend(encode_line(&Line::Part(part(1, 0, 2, testing::batch(), &[1.0]))));
    manifest.extend_from_slice(b"{\"crc\":\"torn");
    std::fs::write(dir.path().join(MANIFEST_FILE), manifest).unwrap();
    let live = Live::new(RunInfo { totals: Totals { records: 1000, ..Totals::default() }, ..RunInfo::default() });
    let totals = Totals { records: 2, parts: 3, ..Totals::default() };
    live.replay(dir.path(), totals, true).unwrap();
    let run = live.run();
    assert_eq!((run.totals, run.step, run.state), (totals, 1, "idle"));
    assert_eq!((run.ranks[0].parts, run.ranks[1].parts, run.ranks[1].dropped), (2, 1, 5));
    assert_eq!((run.refusals[0].count, run.divergences[0].rank), (1, 1));
    assert_eq!(run.revisions[0].words, "revision 1 from step 9 on: layers.*.mlp");
    let (_, series) = live.series(&query());
    assert_eq!((series[0].points.step.as_slice(), series[0].points.complete[0]), ([0, 1].as_slice(), true));
    assert!(close(series[0].points.l2[0], Some(5.0)));
    assert_eq!(live.pick(&one.what.id).unwrap().parts, [one, two]);
    Live::new(RunInfo::default()).replay(&dir.path().join("none"), totals, true).unwrap();
}

#[test]
fn a_run_that_is_shown_again_stays_finished_until_a_rank_attaches() {
    let live = Live::new(RunInfo::default());
    live.show_again(&RunInfo::default());
    assert!(!live.is_shown_again(), "it was not over");
    live.show_again(&RunInfo { finished_ns: Some(9), exit_code: Some(7), ..RunInfo::default() });
    live.info(&RunInfo { notices: vec!["something".into()], ..RunInfo::default() });
    let run = live.run();
    assert_eq!((run.state, run.shown_again, run.info.exit_code), ("finished", true, Some(7)));
    live.attached(0, 10);
    let run = live.run();
    assert_eq!((run.state, run.shown_again, run.info.exit_code), ("live", false, None));
    live.left(0);
    assert_eq!(live.run().state, "idle");
}

#[test]
fn revisions_are_kept_once_each_and_within_a_bound() {
    let live = Live::new(RunInfo::default());
    let tell = |number: u64, text: &str| live.revision(&testing::revision(JobId::default(), number, number, &[text]));
    let known = || live.run().revisions.iter().map(|view| view.revision.revision).collect::<Vec<_>>();
    tell(1, "a");
    tell(1, "a");
    assert_eq!(known(), [1]);
    (2..=2 + MAX_REVISIONS as u64).for_each(|number| tell(number, "b"));
    assert_eq!(known().len(), MAX_REVISIONS);
    (200..210).for_each(|number| tell(number, &"c".repeat(MAX_REVISION_TEXT / 4)));
    assert_eq!(known(), [206, 207, 208, 209]);
}

#[test]
fn notices_and_refusals_are_bounded_and_repeats_are_counted() {
    let live = Live::new(RunInfo::default());
    (0..3 * MAX_NOTICES).for_each(|i| live.notice(&format!("notice {i}")));
    assert_eq!(live.run().notices.len(), MAX_NOTICES);
    let mut what = part(0, 0, 1, testing::batch(), &[1.0]).what;
    (0..7).for_each(|_| live.refused(&what, "sparse"));
    assert_eq!(live.run().refusals[0].count, 7);
    for i in 0..2 * MAX_REFUSALS {
        what.id.module = format!("m{i}");
        live.refused(&what, "sparse");
    }
    assert_eq!(live.run().refusals.len(), MAX_REFUSALS);
}
