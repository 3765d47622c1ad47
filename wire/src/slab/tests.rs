//! The slab between two mappings of the same memory, as two processes have it.

use std::{sync::atomic::Ordering, time::Duration};

use proptest::prelude::*;

use super::*;

/// A bound for hangs.
const HANG: Duration = Duration::from_secs(20);

fn pair(bytes: u64) -> (SlabWriter, SlabReader) {
    let writer = SlabWriter::create(bytes, 3).unwrap();
    let reader = SlabReader::attach(writer.mapping().fd().unwrap().try_clone_to_owned().unwrap()).unwrap();
    (writer, reader)
}

fn send(writer: &mut SlabWriter, meta: &[u8], payload: &[u8]) -> bool {
    let record = writer.begin_record();
    let Some(slot) = writer.try_reserve(record, meta, 0, payload.len() as u64, payload.len() as u64) else {
        return false;
    };
    // SAFETY: the reservation owns payload_len bytes.
    unsafe { std::ptr::copy_nonoverlapping(payload.as_ptr(), slot.payload(), payload.len()) };
    slot.commit();
    true
}

#[test]
fn frames_arrive_in_order_over_many_laps() {
    let (mut writer, mut reader) = pair(8192);
    for n in 0..500u32 {
        let payload = vec![n as u8; (n as usize * 37) % 3000];
        assert!(send(&mut writer, &n.to_le_bytes(), &payload));
        match reader.fetch().unwrap() {
            Fetched::Frame(frame) => {
                assert_eq!(frame.meta, n.to_le_bytes());
                assert_eq!(frame.payload, payload);
                assert!(frame.payload.as_ptr().addr().is_multiple_of(64));
            }
            other => panic!("frame {n}: {other:?}"),
        }
        reader.release().unwrap();
    }
    assert_eq!(writer.begun(), 500);
}

#[test]
fn reserve_fails_when_full_and_succeeds_after_release() {
    let (mut writer, mut reader) = pair(8192);
    let mut sent = 0;
    while send(&mut writer, b"m", &[1; 1000]) {
        sent += 1;
    }
    assert!(sent >= 6, "{sent}");
    assert!(matches!(reader.fetch().unwrap(), Fetched::Frame(_)));
    reader.release().unwrap();
    assert!(matches!(reader.fetch().unwrap(), Fetched::Frame(_)));
    reader.release().unwrap();
    assert!(send(&mut writer, b"m", &[2; 1000]));
}

/// SLAB-6: the release came after the look for room and before the sleep.
#[test]
fn a_release_before_the_sleep_is_not_slept_through() {
    let (mut writer, mut reader) = pair(8192);
    while send(&mut writer, b"m", &[1; 1000]) {}
    let seen = writer.room_seen();
    assert!(matches!(reader.fetch().unwrap(), Fetched::Frame(_)));
    reader.release().unwrap();
    assert!(SlabWriter::wait_for_room(writer.mapping(), seen, HANG), "slept until the limit");
}

/// SLAB-6: whoever is up first does not hide those that still sleep.
#[test]
fn a_release_wakes_all_that_wait() {
    let (mut writer, mut reader) = pair(8192);
    while send(&mut writer, b"m", &[1; 1000]) {}
    let (map, seen) = (writer.mapping().clone(), writer.room_seen());
    std::thread::scope(|scope| {
        let asleep = scope.spawn(|| SlabWriter::wait_for_room(&map, seen, HANG));
        while map.header().waiters.load(Ordering::Relaxed) == 0 {
            std::thread::yield_now();
        }
        // Another thread's wait ends by its limit.
        assert!(!SlabWriter::wait_for_room(&map, seen, Duration::from_millis(1)));
        assert!(matches!(reader.fetch().unwrap(), Fetched::Frame(_)));
        assert_eq!(map.header().waiters.load(Ordering::Relaxed), 1);
        reader.release().unwrap();
        assert!(asleep.join().unwrap(), "slept until the limit");
    });
    assert_eq!(map.header().waiters.load(Ordering::Relaxed), 0);
}

/// SLAB-4: what was checked is what counts.
#[test]
fn a_frame_is_given_back_by_the_length_that_was_checked() {
    for changed in [8, 64, 4096, u64::MAX] {
        let (mut writer, mut reader) = pair(8192);
        assert!(send(&mut writer, b"a", &[1; 100]) && send(&mut writer, b"b", &[2; 100]));
        assert!(matches!(reader.fetch().unwrap(), Fetched::Frame(_)));
        let (base, _) = writer.mapping().whole();
        // SAFETY: the first frame's length lies there, inside the mapping; nothing refers to it.
        unsafe { base.add(HEADER_LEN as usize + 8 + 8).cast::<u64>().write(changed) };
        reader.release().unwrap();
        assert!(matches!(reader.fetch().unwrap(), Fetched::Frame(frame) if frame.meta == b"b"), "changed to {changed}");
    }
}

#[test]
fn nothing_is_given_back_twice() {
    let (mut writer, mut reader) = pair(8192);
    assert!(send(&mut writer, b"a", b"1") && send(&mut writer, b"b", b"2"));
    assert!(reader.release().is_err(), "there was no look at a frame");
    assert!(matches!(reader.fetch().unwrap(), Fetched::Frame(_)));
    reader.release().unwrap();
    assert!(reader.release().is_err());
    assert!(matches!(reader.fetch().unwrap(), Fetched::Frame(frame) if frame.meta == b"b"));
}

/// SLAB-4: before every look of the reader there is another frame that holds nothing.
#[test]
fn a_job_that_goes_on_and_on_does_not_keep_its_reader() {
    let (writer, mut reader) = pair(4096);
    let (map, mut looks) = (writer.mapping().clone(), 0);
    meddle::set(Some(Box::new(move || {
        looks += 1;
        assert!(looks < 10_000, "it does not come back");
        let (head, tail) = (map.header().head.load(Ordering::Relaxed), map.header().tail.load(Ordering::Relaxed));
        if head - tail < map.ring_len() {
            let (at, generation) = (head % map.ring_len(), (head / map.ring_len() + 1) as u32);
            let header = FrameHeader { generation, frame_len: FRAME_ALIGN, ..bytemuck::Zeroable::zeroed() };
            let frame = map.ring(at, FRAME_ALIGN).unwrap();
            // SAFETY: a frame's bytes are inside the ring; nothing refers to them.
            unsafe { frame.add(8).cast::<FrameHeader>().write_unaligned(header) };
            protocol::commit(map.state_word(at).unwrap(), State::Abandoned);
            map.header().head.store(head + FRAME_ALIGN, Ordering::Release);
        }
    })));
    let fetched = reader.fetch();
    meddle::set(None);
    assert!(matches!(fetched, Ok(Fetched::Empty)), "{fetched:?}");
}

/// SLAB-10.
#[test]
fn a_tail_that_cannot_be_frees_nothing() {
    for nonsense in [0, 64, 1 << 20, u64::MAX] {
        let (mut writer, mut reader) = pair(8192);
        while send(&mut writer, b"m", &[1; 1000]) {}
        assert!(matches!(reader.fetch().unwrap(), Fetched::Frame(_)));
        reader.release().unwrap();
        assert!(send(&mut writer, b"m", &[1; 1000]), "one frame's room");
        assert!(!writer.is_astray());
        writer.mapping().header().tail.store(nonsense, Ordering::Release);
        assert!(!send(&mut writer, b"m", &[1; 1000]), "{nonsense}");
        assert!(writer.is_astray());
    }
}

#[test]
fn a_dropped_reservation_is_skipped() {
    let (mut writer, mut reader) = pair(8192);
    drop(writer.try_reserve(1, b"gone", 0, 100, 100).unwrap());
    assert!(send(&mut writer, b"kept", b"x"));
    match reader.fetch().unwrap() {
        Fetched::Frame(frame) => assert_eq!(frame.meta, b"kept"),
        other => panic!("{other:?}"),
    };
}

#[test]
fn an_uncommitted_frame_is_pending() {
    let (mut writer, mut reader) = pair(8192);
    let slot = writer.try_reserve(1, b"m", 0, 4, 4).unwrap();
    assert!(matches!(reader.fetch().unwrap(), Fetched::Pending));
    slot.commit();
    assert!(matches!(reader.fetch().unwrap(), Fetched::Frame(_)));
}

#[test]
fn a_new_reader_continues_where_the_last_one_stopped() {
    let (mut writer, mut reader) = pair(8192);
    send(&mut writer, b"a", b"1");
    send(&mut writer, b"b", b"2");
    assert!(matches!(reader.fetch().unwrap(), Fetched::Frame(_)));
    reader.release().unwrap();
    drop(reader);
    let mut reader = SlabReader::attach(writer.mapping().fd().unwrap().try_clone_to_owned().unwrap()).unwrap();
    match reader.fetch().unwrap() {
        Fetched::Frame(frame) => assert_eq!(frame.meta, b"b"),
        other => panic!("{other:?}"),
    };
}

/// SLAB-7.
#[test]
fn a_slab_is_complete_when_the_last_tensor_in_it_has_ended() {
    let (mut writer, mut reader) = pair(8192);
    let record = writer.begin_record();
    let slot = writer.try_reserve(record, b"m", 0, 4, 4).unwrap();
    assert!(!writer.is_idle(), "a frame is under way");
    slot.commit();
    assert!(writer.is_idle() && !reader.is_complete());
    writer.complete();
    assert!(reader.is_complete() && writer.is_complete());
    assert!(matches!(reader.fetch().unwrap(), Fetched::Frame(_)), "what it holds is still there");
}

/// SLAB-8.
#[test]
fn a_settled_slab_may_go_on_either_side() {
    let (mut writer, mut reader) = pair(8192);
    assert!(send(&mut writer, b"m", &[5; 100]));
    writer.complete();
    assert!(!writer.is_settled());
    let Fetched::Frame(frame) = reader.fetch().unwrap() else { panic!("no frame") };
    assert_eq!(frame.payload, [5; 100]);
    reader.settle();
    assert!(writer.is_settled());
    drop(writer);
    // The job has unmapped it; the agent's own mapping holds.
    assert!(matches!(reader.fetch().unwrap(), Fetched::Frame(frame) if frame.payload == [5; 100]));
}

/// A reader is not asleep for ever at the end of a slab that nothing comes to any more.
#[test]
fn the_word_that_a_slab_is_complete_wakes_its_reader() {
    let (writer, mut reader) = pair(8192);
    std::thread::scope(|scope| {
        let asleep = scope.spawn(|| {
            let mut waits = 0;
            while !reader.is_complete() {
                reader.wait(HANG);
                waits += 1;
            }
            waits
        });
        while writer.mapping().header().agent_waits.load(Ordering::SeqCst) == 0 {
            std::thread::yield_now();
        }
        writer.complete();
        assert!(asleep.join().unwrap() < 10);
    });
}

/// SLAB-9.
#[test]
fn the_header_counts_what_was_begun_and_what_was_lost_before() {
    let (mut writer, reader) = pair(8192);
    writer.lost_before(3);
    assert_eq!(writer.begin_record(), 4);
    let header = reader.mapping().header();
    assert_eq!((header.begun.load(Ordering::Relaxed), header.dropped.load(Ordering::Relaxed)), (4, 3));
    assert_eq!(writer.begun(), 4);
}

#[test]
fn slabs_have_numbers_of_their_own() {
    let [a, b] = [(); 2].map(|()| SlabWriter::create(8192, 0).unwrap().mapping().header().id);
    assert!(a != b && a < 1 << 53 && b < 1 << 53);
}

/// Neither the job's mapping nor the agent's.
#[test]
fn slabs_are_left_out_of_core_dumps() {
    let (writer, reader) = pair(8192);
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    for map in [writer.mapping(), reader.mapping()] {
        let start = format!("{:x}-", map.whole().0.addr());
        let mut lines = smaps.lines().skip_while(|line| !line.starts_with(&start));
        let flags = lines.find_map(|line| line.strip_prefix("VmFlags:")).unwrap();
        assert!(flags.split(' ').any(|flag| flag == "dd"), "{flags}");
    }
}

#[test]
fn memory_that_is_not_a_sealed_slab_is_refused() {
    let file = std::fs::File::open("/dev/null").unwrap();
    assert!(SlabReader::attach(file.into()).is_err());
}

proptest! {
    /// SLAB-4: whatever the job scribbles over the header and the first frame, the reader answers or refuses.
    #[test]
    fn hostile_memory_never_crashes_the_reader(writes in proptest::collection::vec((0usize..4600, any::<u8>()), 1..40)) {
        let (mut writer, _) = pair(8192);
        send(&mut writer, b"meta", &[7; 300]);
        let (base, _) = writer.mapping().whole();
        for (at, value) in writes {
            // SAFETY: inside the mapping of 12288 bytes; no reader is attached.
            unsafe { base.add(at).write(value) };
        }
        if let Ok(mut reader) = SlabReader::attach(writer.mapping().fd().unwrap().try_clone_to_owned().unwrap()) {
            for _ in 0..4 {
                match reader.fetch() {
                    Ok(Fetched::Frame(frame)) => prop_assert!(frame.payload.len() <= 8192),
                    _ => break,
                }
                if reader.release().is_err() { break; }
            }
        }
    }
}
