//! STORE-4: an agent killed at any point, and the next one.

use super::{
    account::{Account, CUT_OFF, LOST_BY_JOB},
    *,
};
use crate::{
    format::Origin,
    testing::{batch, meta, on_rank, revision},
};

/// Writes 3 records of 2 ranks and leaves the directory as `kill -9` would.
fn killed(dir: &Path) {
    let store = store(dir);
    for step in 0..3 {
        for rank in 0..2 {
            let record = on_rank(meta("m", step, 5), rank, 2, batch());
            put(&store, &record, &bytes_of(&record, rank as u8));
        }
    }
    std::mem::forget(store.begin(JobId::default(), meta("never finished", 0, 5)));
    // The kernel drops a dead process's lock; here the process lives on.
    fs::remove_file(dir.join(crate::format::LOCK_FILE)).unwrap();
    std::mem::forget(store);
}

#[test]
fn everything_journalled_survives_and_the_shard_is_sealed() {
    let dir = tempfile::tempdir().unwrap();
    killed(dir.path());
    assert!(shard::open_path(dir.path(), 0).exists());
    assert_sound(dir.path());
    let next = store(dir.path());
    assert_eq!(next.totals().records, 3);
    assert_eq!(next.totals().parts, 6);
    assert_eq!(next.totals().bytes, 6 * 80);
    assert_eq!(sealed(dir.path(), "shard-00000").len(), 3);
    assert_sound(dir.path());
    put(&next, &meta("later", 9, 1), &[3; 16]);
    next.finish(true);
    assert!(sealed(dir.path(), "shard-00001").contains_key("later:forward:out@model0.step9.micro0.call0"));
    assert_eq!(parts(dir.path()).len(), 7);
}

#[test]
fn the_manifest_may_be_torn_at_any_byte_of_its_last_line() {
    let template = tempfile::tempdir().unwrap();
    killed(template.path());
    let manifest = fs::read(template.path().join(MANIFEST_FILE)).unwrap();
    let start = manifest[..manifest.len() - 1].iter().rposition(|&b| b == b'\n').unwrap() + 1;
    for cut in (start..manifest.len()).step_by(7) {
        let dir = tempfile::tempdir().unwrap();
        fs::copy(shard::open_path(template.path(), 0), shard::open_path(dir.path(), 0)).unwrap();
        fs::write(dir.path().join(MANIFEST_FILE), &manifest[..cut]).unwrap();
        let next = store(dir.path());
        assert_eq!(next.totals().parts, 5, "cut at {cut}");
        next.finish(true);
        assert_sound(dir.path());
        assert_eq!(sealed(dir.path(), "shard-00000").len(), 3);
    }
}

#[test]
fn killed_between_header_and_rename_it_is_sealed_again() {
    let dir = tempfile::tempdir().unwrap();
    killed(dir.path());
    let file = shard::ShardFile::open(dir.path(), 0).unwrap();
    file.write_at(b"half a header", 0).unwrap();
    store(dir.path()).finish(true);
    assert_eq!(sealed(dir.path(), "shard-00000").len(), 3);
}

#[test]
fn killed_between_rename_and_its_line_the_line_is_added() {
    let dir = tempfile::tempdir().unwrap();
    killed(dir.path());
    store(dir.path()).finish(true);
    let whole = fs::read(dir.path().join(MANIFEST_FILE)).unwrap();
    let without: Vec<u8> = whole
        .split_inclusive(|&b| b == b'\n')
        .filter(|l| !l.windows(6).any(|w| w == b"sealed"))
        .flatten()
        .copied()
        .collect();
    assert!(without.len() < whole.len());
    fs::write(dir.path().join(MANIFEST_FILE), without).unwrap();
    store(dir.path()).finish(true);
    assert_eq!(fs::read(dir.path().join(MANIFEST_FILE)).unwrap(), whole);
}

#[test]
fn killed_before_the_first_line_nothing_is_left_over() {
    let dir = tempfile::tempdir().unwrap();
    shard::ShardFile::create(dir.path(), 0).unwrap();
    fs::write(dir.path().join(crate::format::LOCK_FILE), "").unwrap();
    let next = store(dir.path());
    put(&next, &meta("a", 0, 1), &[3; 16]);
    next.finish(true);
    assert_sound(dir.path());
    assert!(!shard::open_path(dir.path(), 0).exists());
}

#[test]
fn the_last_revision_of_each_job_is_known_to_the_next_agent() {
    let dir = tempfile::tempdir().unwrap();
    let first = store(dir.path());
    assert_eq!(first.revisions(), []);
    let other = JobId { job: 1, attempt: 0 };
    let told = [
        revision(JobId::default(), 1, 5, &["a"]),
        revision(other, 1, 2, &["c"]),
        revision(JobId::default(), 3, 9, &["a", "b"]),
    ];
    told.iter().for_each(|revision| first.revision(revision));
    let last = [told[2].clone(), told[1].clone()];
    assert_eq!(first.revisions(), last);
    std::mem::forget(first);
    fs::remove_file(dir.path().join(crate::format::LOCK_FILE)).unwrap();
    let next = store(dir.path());
    assert_eq!(next.revisions(), last);
    next.finish(true);
    drop(next);
    assert_eq!(store(dir.path()).revisions(), last);
    assert_eq!(lines(dir.path()), told.map(Line::Revision));
}

/// STORE-5.
#[test]
fn what_a_dead_agent_had_of_a_slab_is_known_to_the_next() {
    let dir = tempfile::tempdir().unwrap();
    let first = store(dir.path());
    let stored = |store: &Arc<Store>, record: u64| {
        let mut part = store.begin(JobId::default(), meta("m", record, 5)).out_of(Origin(9, record));
        part.write(0, &bytes_of(&meta("m", record, 5), 1));
        part.finish()
    };
    assert!(matches!(stored(&first, 1), Outcome::Stored { .. }));
    let refused = RecordMeta { refused: "a sparse tensor".into(), ..meta("m", 2, 5) };
    first.refused(JobId::default(), refused, Some(Origin(9, 2)));
    assert!(matches!(stored(&first, 4), Outcome::Stored { .. }));
    // A tensor whose pieces do not come is lost.
    assert!(matches!(first.begin(JobId::default(), meta("m", 3, 5)).out_of(Origin(9, 3)).finish(), Outcome::Lost));
    first.dropped(0, 5, LOST_BY_JOB, Some(Origin(9, 0)));
    first.dropped(0, 2, CUT_OFF, Some(Origin(9, 11)));
    first.dropped(0, 7, "no slab", None);
    std::mem::forget(first);
    fs::remove_file(dir.path().join(crate::format::LOCK_FILE)).unwrap();
    let next = store(dir.path());
    assert_eq!(next.account(9), Account { settled: 6, by_job: 5, last: 11, cut_off: 11 });
    assert_eq!(next.account(9).missing(12), 1);
    assert_eq!(account::known(dir.path()).unwrap(), [(0, 18)].into());
    assert_eq!((next.account(8), next.totals().dropped), (Account::default(), 15));
    next.keep_account(9, Account { settled: 7, ..next.account(9) });
    assert_eq!(next.account(9).missing(12), 0);
}

#[test]
fn damage_in_the_middle_costs_its_line_only() {
    let dir = tempfile::tempdir().unwrap();
    killed(dir.path());
    let path = dir.path().join(MANIFEST_FILE);
    let mut manifest = fs::read(&path).unwrap();
    manifest[40] ^= 0xff;
    fs::write(&path, manifest).unwrap();
    let next = store(dir.path());
    assert_eq!(next.totals().parts, 5);
    assert_eq!(sealed(dir.path(), "shard-00000").len(), 3);
}

#[test]
fn a_shard_cut_short_by_a_power_loss_still_opens() {
    let dir = tempfile::tempdir().unwrap();
    killed(dir.path());
    let file = shard::ShardFile::open(dir.path(), 0).unwrap();
    file.file().set_len(crate::format::HEADER_SPACE + 200).unwrap();
    store(dir.path()).finish(true);
    assert_eq!(sealed(dir.path(), "shard-00000").len(), 1, "of 192 bytes and a torn rest, one record is whole");
}

#[test]
fn lines_with_impossible_places_are_survived() {
    let dir = tempfile::tempdir().unwrap();
    killed(dir.path());
    let mut manifest = fs::read(dir.path().join(MANIFEST_FILE)).unwrap();
    for (offset, len) in [(0, 16), (u64::MAX, 16), (1 << 20, u64::MAX), (1 << 60, 16), ((1 << 20) + 3, 16)] {
        let mut part = crate::testing::part("evil", 0, 1);
        part.at = Some(Location { shard: "shard-00000".into(), offset, len, crc: 0 });
        manifest.extend_from_slice(&crate::manifest::encode_line(&Line::Part(part)));
    }
    fs::write(dir.path().join(MANIFEST_FILE), manifest).unwrap();
    store(dir.path()).finish(true);
    assert_eq!(sealed(dir.path(), "shard-00000").len(), 3);
}
