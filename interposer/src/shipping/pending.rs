//! Copies from a device that are still under way: one thread waits for them in order and commits their frames.

use std::{
    ffi::c_void,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use crossbeam::channel::{Sender, unbounded};
use wire::slab::Reservation;

use super::voyage::Voyage;
use crate::boot;

static QUEUE: OnceLock<Option<Sender<Job>>> = OnceLock::new();
static UNDER_WAY: AtomicU64 = AtomicU64::new(0);

struct Job {
    ticket: *mut c_void,
    slot: Reservation,
    voyage: Arc<Voyage>,
}

// SAFETY: a ticket may be waited for from any thread (BridgeTable).
unsafe impl Send for Job {}

/// Commits `slot` when the copy behind `ticket` is done. The queue holds no tensor bytes, and no more entries than
/// the slab has frames.
pub fn finish_later(ticket: *mut c_void, slot: Reservation, voyage: Arc<Voyage>) {
    let queue = QUEUE.get_or_init(|| {
        let (sender, receiver) = unbounded::<Job>();
        let worker = move || {
            for job in receiver {
                finish(job);
                UNDER_WAY.fetch_sub(1, Ordering::Release);
            }
        };
        thread::Builder::new().name("flexmodel-copies".into()).spawn(worker).is_ok().then_some(sender)
    });
    UNDER_WAY.fetch_add(1, Ordering::Acquire);
    let job = Job { ticket, slot, voyage };
    let left = match queue {
        Some(sender) => sender.send(job).err().map(|e| e.0),
        None => Some(job),
    };
    if let Some(job) = left {
        finish(job);
        UNDER_WAY.fetch_sub(1, Ordering::Release);
    }
}

fn finish(job: Job) {
    static TOLD: AtomicBool = AtomicBool::new(false);
    // SAFETY: the ticket came from the bridge and is given to it once.
    let arrived = boot::bridge().is_some_and(|bridge| unsafe { (bridge.wait)(job.ticket) });
    settle(job.slot, &job.voyage, arrived);
    if !arrived && !TOLD.swap(true, Ordering::Relaxed) {
        super::notice("a copy from the device failed: that capture is lost, and so are others like it".into());
    }
}

/// Hands a frame over, or gives it up and its tensor with it. Of a tensor that is counted as lost no more goes to the
/// agent, which would count it again when its end comes.
fn settle(slot: Reservation, voyage: &Voyage, arrived: bool) {
    if arrived && !voyage.is_lost() {
        slot.commit();
    } else {
        voyage.lose();
    }
}

/// Waits until no copy is under way, at most `limit`.
pub fn drain(limit: Duration) {
    let end = Instant::now() + limit;
    while UNDER_WAY.load(Ordering::Acquire) > 0 && Instant::now() < end {
        thread::sleep(Duration::from_millis(1));
    }
}

#[cfg(test)]
mod tests {
    use wire::slab::{Fetched, SlabReader, SlabWriter};

    use super::*;

    #[test]
    fn a_tensor_whose_first_copy_failed_sends_no_end() {
        let mut writer = SlabWriter::create(1 << 20, 0).unwrap();
        let mut reader = SlabReader::attach(writer.mapping().fd().unwrap().try_clone_to_owned().unwrap()).unwrap();
        let record = writer.begin_record();
        let voyage = Voyage::new(writer.mapping().clone(), record, 64);
        for arrived in [false, true] {
            let slot = writer.try_reserve(record, b"", u64::from(arrived) * 64, 64, 128).unwrap();
            settle(slot, &voyage, arrived);
        }
        assert!(matches!(reader.fetch().unwrap(), Fetched::Empty));
        assert_eq!(writer.mapping().header().dropped.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn a_copy_that_failed_is_counted_once_and_the_next_tensor_arrives() {
        let mut writer = SlabWriter::create(1 << 20, 0).unwrap();
        let mut reader = SlabReader::attach(writer.mapping().fd().unwrap().try_clone_to_owned().unwrap()).unwrap();
        for arrived in [false, true] {
            let record = writer.begin_record();
            let voyage = Voyage::new(writer.mapping().clone(), record, 64);
            for piece in 0..2 {
                let meta: &[u8] = if piece == 0 { b"meta" } else { b"" };
                let slot = writer.try_reserve(record, meta, piece * 64, 64, 128).unwrap();
                settle(slot, &voyage, arrived);
            }
            assert_eq!(voyage.is_lost(), !arrived);
        }
        assert_eq!(writer.mapping().header().dropped.load(Ordering::Relaxed), 1);
        let fetched = reader.fetch().unwrap();
        assert!(matches!(&fetched, Fetched::Frame(frame) if frame.record == 2), "{fetched:?}");
    }
}
