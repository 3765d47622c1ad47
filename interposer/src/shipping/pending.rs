//! Copies from a device that are still under way: one thread waits for them in order and commits their frames.

use std::{
    ffi::c_void,
    sync::{
        OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use crossbeam::channel::{Sender, unbounded};
use wire::slab::Reservation;

use crate::boot;

static QUEUE: OnceLock<Option<Sender<Job>>> = OnceLock::new();
static UNDER_WAY: AtomicU64 = AtomicU64::new(0);

struct Job {
    ticket: *mut c_void,
    slot: Reservation,
}

// SAFETY: a ticket may be waited for from any thread (BridgeTable).
unsafe impl Send for Job {}

/// Commits `slot` when the copy behind `ticket` is done. The queue holds no tensor bytes, and no more entries than
/// the slab has frames.
pub fn finish_later(ticket: *mut c_void, slot: Reservation) {
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
    let job = Job { ticket, slot };
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
    // SAFETY: the ticket came from the bridge and is given to it once.
    if boot::bridge().is_some_and(|bridge| unsafe { (bridge.wait)(job.ticket) }) {
        job.slot.commit();
    }
}

/// Waits until no copy is under way, at most `limit`.
pub fn drain(limit: Duration) {
    let end = Instant::now() + limit;
    while UNDER_WAY.load(Ordering::Acquire) > 0 && Instant::now() < end {
        thread::sleep(Duration::from_millis(1));
    }
}
