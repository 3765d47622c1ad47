//! STORE-4: an agent killed at any point, and the next one.

use super::{
    testing::{batch, meta, on_rank},
    *,
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
    std::mem::forget(store.begin(meta("never finished", 0, 5)));
    // The kernel drops a dead process's lock; here the process lives on.
    fs::remove_file(dir.join(format::LOCK_FILE)).unwrap();
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
    next.finish();
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
        next.finish();
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
    store(dir.path()).finish();
    assert_eq!(sealed(dir.path(), "shard-00000").len(), 3);
}

#[test]
fn killed_between_rename_and_its_line_the_line_is_added() {
    let dir = tempfile::tempdir().unwrap();
    killed(dir.path());
    store(dir.path()).finish();
    let whole = fs::read(dir.path().join(MANIFEST_FILE)).unwrap();
    let without: Vec<u8> = whole
        .split_inclusive(|&b| b == b'\n')
        .filter(|l| !l.windows(6).any(|w| w == b"sealed"))
        .flatten()
        .copied()
        .collect();
    assert!(without.len() < whole.len());
    fs::write(dir.path().join(MANIFEST_FILE), without).unwrap();
    store(dir.path()).finish();
    assert_eq!(fs::read(dir.path().join(MANIFEST_FILE)).unwrap(), whole);
}

#[test]
fn killed_before_the_first_line_nothing_is_left_over() {
    let dir = tempfile::tempdir().unwrap();
    shard::ShardFile::create(dir.path(), 0).unwrap();
    fs::write(dir.path().join(format::LOCK_FILE), "").unwrap();
    let next = store(dir.path());
    put(&next, &meta("a", 0, 1), &[3; 16]);
    next.finish();
    assert_sound(dir.path());
    assert!(!shard::open_path(dir.path(), 0).exists());
}

#[test]
fn the_frame_that_was_journalled_but_not_released_is_not_stored_twice() {
    let dir = tempfile::tempdir().unwrap();
    killed(dir.path());
    let next = store(dir.path());
    let again = on_rank(meta("m", 2, 5), 1, 2, batch());
    let mut part = next.begin(again.clone());
    part.write(0, &bytes_of(&again, 1));
    assert!(matches!(part.finish(), Outcome::Repeated));
    put(&next, &again, &bytes_of(&again, 1));
    assert_eq!(next.totals().parts, 7, "only the first frame after the crash can be a repetition");
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
    file.file().set_len(format::HEADER_SPACE + 200).unwrap();
    store(dir.path()).finish();
    assert_eq!(sealed(dir.path(), "shard-00000").len(), 1, "of 192 bytes and a torn rest, one record is whole");
}

#[test]
fn lines_with_impossible_places_are_survived() {
    let dir = tempfile::tempdir().unwrap();
    killed(dir.path());
    let mut manifest = fs::read(dir.path().join(MANIFEST_FILE)).unwrap();
    for (offset, len) in [(0, 16), (u64::MAX, 16), (1 << 20, u64::MAX), (1 << 60, 16), ((1 << 20) + 3, 16)] {
        let mut part = testing::part("evil", 0, 1);
        part.at = Some(Location { shard: "shard-00000".into(), offset, len, crc: 0 });
        manifest.extend_from_slice(&manifest::encode_line(&Line::Part(part)));
    }
    fs::write(dir.path().join(MANIFEST_FILE), manifest).unwrap();
    store(dir.path()).finish();
    assert_eq!(sealed(dir.path(), "shard-00000").len(), 3);
}
