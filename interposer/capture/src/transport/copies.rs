//! Copies from a device that are still under way: one thread waits for them in order and commits their frames.

use std::{
    ffi::c_void,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use crossbeam::channel::{Sender, unbounded};
use wire::{slab::Reservation, tap_abi::BridgeTable};

use super::in_flight::InFlight;

/// A copy under way, and the frame that it fills.
struct Copy {
    ticket: *mut c_void,
    slot: Reservation,
    record: Arc<InFlight>,
}

// SAFETY: a ticket may be waited for from any thread (BridgeTable).
unsafe impl Send for Copy {}

/// The copies under way. They hold no tensor bytes, and there are no more of them than slabs have frames.
pub struct Copies {
    bridge: &'static BridgeTable,
    /// Called when a copy has failed.
    failed: Arc<dyn Fn() + Send + Sync>,
    /// The thread, once there was a copy; `None` if none could be made.
    queue: OnceLock<Option<Sender<Copy>>>,
    under_way: Arc<AtomicU64>,
}

impl Copies {
    /// None yet.
    pub fn new(bridge: &'static BridgeTable, failed: Arc<dyn Fn() + Send + Sync>) -> Self {
        Self { bridge, failed, queue: OnceLock::new(), under_way: Arc::default() }
    }

    /// Commits `slot` when the copy behind `ticket` is done.
    pub fn finish_later(&self, ticket: *mut c_void, slot: Reservation, record: Arc<InFlight>) {
        let queue = self.queue.get_or_init(|| self.start());
        self.under_way.fetch_add(1, Ordering::Acquire);
        let copy = Copy { ticket, slot, record };
        let left = match queue {
            Some(sender) => sender.send(copy).err().map(|e| e.0),
            None => Some(copy),
        };
        if let Some(copy) = left {
            finish(self.bridge, &*self.failed, copy);
            self.under_way.fetch_sub(1, Ordering::Release);
        }
    }

    fn start(&self) -> Option<Sender<Copy>> {
        let (sender, receiver) = unbounded::<Copy>();
        let (bridge, failed, under_way) = (self.bridge, self.failed.clone(), self.under_way.clone());
        let worker = move || {
            for copy in receiver {
                finish(bridge, &*failed, copy);
                under_way.fetch_sub(1, Ordering::Release);
            }
        };
        thread::Builder::new().name("flexmodel-copies".into()).spawn(worker).is_ok().then_some(sender)
    }

    /// Waits until no copy is under way, at most `limit`.
    pub fn drain(&self, limit: Duration) {
        let end = Instant::now() + limit;
        while self.under_way.load(Ordering::Acquire) > 0 && Instant::now() < end {
            thread::sleep(Duration::from_millis(1));
        }
    }
}

fn finish(bridge: &BridgeTable, failed: &(dyn Fn() + Send + Sync), copy: Copy) {
    // SAFETY: the ticket came from the bridge and is given to it once.
    let arrived = unsafe { (bridge.wait)(copy.ticket) };
    settle(copy.slot, &copy.record, arrived);
    if !arrived {
        failed();
    }
}

/// Hands a frame over, or gives it up and its tensor with it. Of a tensor that is counted as lost no more goes to the
/// agent, which would count it again when its end comes.
fn settle(slot: Reservation, record: &InFlight, arrived: bool) {
    if arrived && !record.is_lost() {
        slot.commit();
    } else {
        record.lose();
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
        let in_flight = InFlight::new(writer.mapping().clone(), record, 64);
        for arrived in [false, true] {
            let slot = writer.try_reserve(record, b"", u64::from(arrived) * 64, 64, 128).unwrap();
            settle(slot, &in_flight, arrived);
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
            let in_flight = InFlight::new(writer.mapping().clone(), record, 64);
            for piece in 0..2 {
                let meta: &[u8] = if piece == 0 { b"meta" } else { b"" };
                let slot = writer.try_reserve(record, meta, piece * 64, 64, 128).unwrap();
                settle(slot, &in_flight, arrived);
            }
            assert_eq!(in_flight.is_lost(), !arrived);
        }
        assert_eq!(writer.mapping().header().dropped.load(Ordering::Relaxed), 1);
        let fetched = reader.fetch().unwrap();
        assert!(matches!(&fetched, Fetched::Frame(frame) if frame.record == 2), "{fetched:?}");
    }
}
