//! Copies from a device: one thread makes them in order, waits for them and commits their frames.

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
use wire::{
    codes::CopyState,
    slab::{Mapping, Reservation},
    tap_abi::BridgeTable,
};

use super::in_flight::InFlight;

/// A copy under way, and the frame that it fills.
struct Copy {
    ticket: *mut c_void,
    slot: Reservation,
    record: Arc<InFlight>,
}

// SAFETY: a ticket may be waited for from any thread (BridgeTable).
unsafe impl Send for Copy {}

/// What the user should hear of copies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// A slab cannot be pinned.
    Slow,
    /// A copy has failed.
    Failed,
}

/// Hears of [`Trouble`], each time.
type Tell = Arc<dyn Fn(Trouble) + Send + Sync>;

/// The copies under way. They hold no tensor bytes, and there are no more of them than slabs have frames.
pub struct Copies {
    bridge: &'static BridgeTable,
    tell: Tell,
    /// The thread, once there was a copy; `None` if none could be made.
    queue: OnceLock<Option<Sender<Copy>>>,
    under_way: Arc<AtomicU64>,
}

impl Copies {
    /// None yet.
    pub fn new(bridge: &'static BridgeTable, tell: Tell) -> Self {
        Self { bridge, tell, queue: OnceLock::new(), under_way: Arc::default() }
    }

    /// Makes the copy behind `ticket`, and then commits `slot`.
    pub fn finish_later(&self, ticket: *mut c_void, slot: Reservation, record: Arc<InFlight>) {
        let queue = self.queue.get_or_init(|| self.start());
        self.under_way.fetch_add(1, Ordering::Acquire);
        let copy = Copy { ticket, slot, record };
        let left = match queue {
            Some(sender) => sender.send(copy).err().map(|e| e.0),
            None => Some(copy),
        };
        if let Some(copy) = left {
            finish(self.bridge, &self.tell, copy);
            self.under_way.fetch_sub(1, Ordering::Release);
        }
    }

    fn start(&self) -> Option<Sender<Copy>> {
        let (sender, receiver) = unbounded::<Copy>();
        let (bridge, tell, under_way) = (self.bridge, self.tell.clone(), self.under_way.clone());
        let worker = move || {
            for copy in receiver {
                finish(bridge, &tell, copy);
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

fn finish(bridge: &BridgeTable, tell: &Tell, copy: Copy) {
    if let Some(pinning) = &copy.record.pinning
        && pinning.before_copy(|| pin(bridge, copy.ticket, &copy.record.map))
    {
        tell(Trouble::Slow);
    }
    // SAFETY: the ticket came from the bridge and is given to it once.
    let state = unsafe { (bridge.wait)(copy.ticket) };
    settle(copy.slot, &copy.record, state);
    if state != CopyState::Done {
        tell(Trouble::Failed);
    }
}

/// Pins a slab for copies such as this one. It stays mapped then, since a device may write to it.
fn pin(bridge: &BridgeTable, ticket: *mut c_void, map: &Mapping) -> bool {
    let (base, len) = map.whole();
    // SAFETY: the ticket came from the bridge and is waited for later; the range is mapped, and stays so if it is pinned.
    let pinned = unsafe { (bridge.pin)(ticket, base, len) };
    if pinned {
        map.keep_mapped();
    }
    pinned
}

/// Hands a frame over, or gives it up and its tensor with it. Of a tensor that is counted as lost no more goes to the
/// agent, which would count it again when its end comes.
fn settle(slot: Reservation, record: &InFlight, state: CopyState) {
    match state {
        CopyState::Done if !record.is_lost() => return slot.commit(),
        // A device may still write there: nobody gets this room again, and it stays mapped.
        CopyState::Pending => std::mem::forget(slot),
        CopyState::Done | CopyState::Failed => drop(slot),
    }
    record.lose();
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use wire::slab::{Fetched, SlabReader, SlabWriter};

    use super::*;
    use crate::testing::BRIDGE;

    #[test]
    fn copies_and_what_pins_the_slab_for_them_are_on_a_thread_of_ours() {
        let mut writer = SlabWriter::create(1 << 20, 0).unwrap();
        let mut reader = SlabReader::attach(writer.mapping().fd().unwrap().try_clone_to_owned().unwrap()).unwrap();
        let told = Arc::new(Mutex::new(Vec::new()));
        let hears = told.clone();
        let tell = move |trouble| hears.lock().unwrap().push((trouble, thread::current().name().map(str::to_owned)));
        // This bridge pins nothing.
        let copies = Copies::new(&BRIDGE, Arc::new(tell));
        let pinning = Some(Arc::default());
        for _ in 0..2 {
            let record = writer.begin_record();
            let slot = writer.try_reserve(record, b"meta", 0, 64, 64).unwrap();
            let in_flight = InFlight::new(writer.mapping().clone(), record, 64, pinning.clone());
            copies.finish_later(std::ptr::null_mut(), slot, Arc::new(in_flight));
        }
        copies.drain(Duration::from_secs(30));
        assert_eq!(*told.lock().unwrap(), [(Trouble::Slow, Some("flexmodel-copies".to_owned()))], "said once");
        for _ in 0..2 {
            assert!(matches!(reader.fetch().unwrap(), Fetched::Frame(_)));
        }
    }

    #[test]
    fn a_tensor_whose_first_copy_failed_sends_no_end() {
        let mut writer = SlabWriter::create(1 << 20, 0).unwrap();
        let mut reader = SlabReader::attach(writer.mapping().fd().unwrap().try_clone_to_owned().unwrap()).unwrap();
        let record = writer.begin_record();
        let in_flight = InFlight::new(writer.mapping().clone(), record, 64, None);
        for arrived in [false, true] {
            let slot = writer.try_reserve(record, b"", u64::from(arrived) * 64, 64, 128).unwrap();
            settle(slot, &in_flight, if arrived { CopyState::Done } else { CopyState::Failed });
        }
        assert!(matches!(reader.fetch().unwrap(), Fetched::Empty));
        assert_eq!(writer.mapping().header().dropped.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn the_room_of_a_copy_that_cannot_be_waited_for_is_never_given_away() {
        let mut writer = SlabWriter::create(1 << 20, 0).unwrap();
        let mut reader = SlabReader::attach(writer.mapping().fd().unwrap().try_clone_to_owned().unwrap()).unwrap();
        let (record, piece) = (writer.begin_record(), writer.max_piece());
        let in_flight = InFlight::new(writer.mapping().clone(), record, piece, None);
        let slot = writer.try_reserve(record, b"", 0, piece, piece).unwrap();
        let (from, to) = (slot.payload().addr(), slot.payload().addr() + piece as usize);
        settle(slot, &in_flight, CopyState::Pending);
        let record = writer.begin_record();
        let mut more = 0;
        while let Some(slot) = writer.try_reserve(record, b"", 0, piece, piece) {
            let at = slot.payload().addr();
            assert!(at + piece as usize <= from || to <= at, "it lies in what a device may write to");
            slot.commit();
            let _ = reader.fetch().unwrap();
            more += 1;
            assert!(more < 10, "the slab would have to be full");
        }
        assert_eq!(writer.mapping().header().dropped.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn a_copy_that_failed_is_counted_once_and_the_next_tensor_arrives() {
        let mut writer = SlabWriter::create(1 << 20, 0).unwrap();
        let mut reader = SlabReader::attach(writer.mapping().fd().unwrap().try_clone_to_owned().unwrap()).unwrap();
        for arrived in [false, true] {
            let record = writer.begin_record();
            let in_flight = InFlight::new(writer.mapping().clone(), record, 64, None);
            for piece in 0..2 {
                let meta: &[u8] = if piece == 0 { b"meta" } else { b"" };
                let slot = writer.try_reserve(record, meta, piece * 64, 64, 128).unwrap();
                settle(slot, &in_flight, if arrived { CopyState::Done } else { CopyState::Failed });
            }
            assert_eq!(in_flight.is_lost(), !arrived);
        }
        assert_eq!(writer.mapping().header().dropped.load(Ordering::Relaxed), 1);
        let fetched = reader.fetch().unwrap();
        assert!(matches!(&fetched, Fetched::Frame(frame) if frame.record == 2), "{fetched:?}");
    }
}
