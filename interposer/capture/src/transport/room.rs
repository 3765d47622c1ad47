//! Waiting for room in the slab, within bounds (WAIT-1).

use std::{
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use wire::{
    env::OnFull,
    slab::{Mapping, Reservation, SlabWriter},
};

use super::{GLANCE, Transport, in_flight::InFlight, state::State};

/// An agent whose heart stands still this long is taken for stopped.
const NO_HEARTBEAT: Duration = Duration::from_secs(2);
/// An agent that frees nothing this long is taken for stuck.
const NO_PROGRESS: Duration = Duration::from_secs(60);

impl Transport {
    /// A frame, or `None` if the tensor has to be dropped.
    pub(super) fn reserve(&self, record: &InFlight, meta: &[u8], at: u64, len: u64, total: u64) -> Option<Reservation> {
        let mut patience: Option<Patience> = None;
        loop {
            let seen = {
                let mut state = self.lock();
                // The process has become another rank meanwhile: that slab is left.
                let writer = state.slabs.writer_of(&record.map)?;
                if let Some(slot) = writer.try_reserve(record.record, meta, at, len, total) {
                    state.stalled = None;
                    return Some(slot);
                }
                let seen = writer.room_seen();
                if writer.is_astray() {
                    drop(state);
                    if !self.said_astray.swap(true, Ordering::Relaxed) {
                        self.notice(
                            "the agent writes nonsense into shared memory: captures are lost that it has no room for"
                                .into(),
                        );
                    }
                    return None;
                }
                state.slabs.full = true;
                if state.on_full == OnFull::Drop || !state.agent_is_there() || state.still_stalled() {
                    return None;
                }
                if patience.get_or_insert_with(|| Patience::new(&record.map)).spent(&record.map) {
                    state.stalled = Some((record.map.header().id, pulse(&record.map).1));
                    drop(state);
                    self.notice("the agent stands still: captures are dropped until it moves again".into());
                    return None;
                }
                seen
            };
            SlabWriter::wait_for_room(&record.map, seen, GLANCE);
        }
    }
}

/// Heartbeat and tail: what shows that an agent moves.
fn pulse(map: &Mapping) -> (u32, u64) {
    let header = map.header();
    (header.heartbeat.load(Ordering::Acquire), header.tail.load(Ordering::Acquire))
}

impl State {
    /// Whether an agent that stood still has not moved since.
    fn still_stalled(&mut self) -> bool {
        let stands = |(id, tail)| self.slabs.numbered(id).is_some_and(|writer| pulse(writer.mapping()).1 == tail);
        let stalled = self.stalled.is_some_and(stands);
        if !stalled {
            self.stalled = None;
        }
        stalled
    }
}

/// Bounds a wait for room.
struct Patience {
    pulse: (u32, u64),
    beat_at: Instant,
    moved_at: Instant,
}

impl Patience {
    fn new(map: &Mapping) -> Self {
        let now = Instant::now();
        Self { pulse: pulse(map), beat_at: now, moved_at: now }
    }

    fn spent(&mut self, map: &Mapping) -> bool {
        let (beat, tail) = pulse(map);
        let now = Instant::now();
        if beat != self.pulse.0 {
            self.beat_at = now;
        }
        if tail != self.pulse.1 {
            self.moved_at = now;
        }
        self.pulse = (beat, tail);
        now.duration_since(self.beat_at) > NO_HEARTBEAT || now.duration_since(self.moved_at) > NO_PROGRESS
    }
}
