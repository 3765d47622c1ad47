//! The job's side of a slab.

use std::{sync::atomic::Ordering, time::Duration};

use super::{
    layout::{FRAME_ALIGN, FRAME_HEADER_LEN, FrameHeader, Header, MAX_META, State},
    map::{Mapping, SlabError, sleep, wake},
    protocol,
};

/// Writes frames. Not `Sync`: the job keeps it behind a lock and copies payloads outside of that lock.
#[derive(Debug)]
pub struct SlabWriter {
    map: std::sync::Arc<Mapping>,
    head: u64,
    /// How far the agent has released it, as far as that can be true.
    tail: u64,
    /// The agent has written a tail that cannot be.
    astray: bool,
    next_record: u64,
    room_seen: u32,
}

/// A frame that is the job's until it is committed. Dropping it gives the frame up.
#[derive(Debug)]
pub struct Reservation {
    map: std::sync::Arc<Mapping>,
    at: u64,
    payload: *mut u8,
    payload_len: u64,
    done: bool,
}

// SAFETY: the frame belongs to whoever holds the reservation (SLAB-3).
unsafe impl Send for Reservation {}

impl SlabWriter {
    /// Makes the slab.
    pub fn create(bytes: u64, rank: u32) -> Result<Self, SlabError> {
        let map = std::sync::Arc::new(Mapping::create(bytes, rank)?);
        Ok(Self { map, head: 0, tail: 0, astray: false, next_record: 1, room_seen: 0 })
    }

    /// The memory, for sending and pinning.
    pub fn mapping(&self) -> &std::sync::Arc<Mapping> {
        &self.map
    }

    /// Largest payload a single frame may carry: a quarter of the ring, so that pieces overlap with their draining.
    pub fn max_piece(&self) -> u64 {
        (self.map.ring_len() / 4).saturating_sub(u64::from(MAX_META) + FRAME_HEADER_LEN + FRAME_ALIGN).max(FRAME_ALIGN)
            / FRAME_ALIGN
            * FRAME_ALIGN
    }

    /// The number that the next tensor will have.
    pub fn next_record(&self) -> u64 {
        self.next_record
    }

    /// A number for the next tensor.
    pub fn begin_record(&mut self) -> u64 {
        let n = self.next_record;
        self.next_record += 1;
        self.map.header().begun.store(n, Ordering::Relaxed);
        n
    }

    /// Counts tensors as lost that were to be captured before there was this slab.
    pub fn lost_before(&mut self, count: u64) {
        self.next_record += count;
        self.map.header().begun.store(self.begun(), Ordering::Relaxed);
        self.map.header().dropped.fetch_add(count, Ordering::Relaxed);
    }

    /// Tensors that have a number.
    pub fn begun(&self) -> u64 {
        self.next_record - 1
    }

    /// Reserves a frame, or `None` while there is no room for it: then [`wait_for_room`](Self::wait_for_room) with
    /// [`room_seen`](Self::room_seen). `meta` goes with a tensor's first piece.
    pub fn try_reserve(
        &mut self,
        record: u64,
        meta: &[u8],
        piece_offset: u64,
        payload_len: u64,
        total_len: u64,
    ) -> Option<Reservation> {
        let meta_len = u32::try_from(meta.len()).ok().filter(|&n| n <= MAX_META)?;
        let start = FrameHeader::payload_start(meta_len);
        let frame_len = start.checked_add(payload_len)?.checked_next_multiple_of(FRAME_ALIGN)?;
        let ring = self.map.ring_len();
        if frame_len > ring {
            return None;
        }
        self.room_seen = protocol::releases(&self.map.header().room);
        let mut at = self.head % ring;
        let pad = if at + frame_len > ring { ring - at } else { 0 };
        if self.room(ring) < pad + frame_len {
            return None;
        }
        if pad > 0 {
            let header = FrameHeader { frame_len: pad, ..self.blank(self.head) };
            self.put(at, header, &[], State::Pad)?;
            self.head += pad;
            at = 0;
        }
        let header =
            FrameHeader { meta_len, frame_len, record, piece_offset, payload_len, total_len, ..self.blank(self.head) };
        self.put(at, header, meta, State::Writing)?;
        self.head += frame_len;
        protocol::publish(&self.map.header().head, self.head);
        let payload = self.map.ring(at + start, payload_len)?;
        Some(Reservation { map: self.map.clone(), at, payload, payload_len, done: false })
    }

    /// Free bytes of the ring. A tail that is behind the last one or ahead of the head frees nothing (SLAB-10).
    fn room(&mut self, ring: u64) -> u64 {
        let tail = protocol::tail(&self.map.header().tail);
        if (self.tail..=self.head).contains(&tail) {
            self.tail = tail;
        } else {
            self.astray = true;
        }
        protocol::room(self.head, self.tail, ring)
    }

    /// Whether the agent has ever said that it released what it cannot have (SLAB-10): waiting for it may have no end.
    pub fn is_astray(&self) -> bool {
        self.astray
    }

    fn blank(&self, position: u64) -> FrameHeader {
        FrameHeader { generation: (position / self.map.ring_len() + 1) as u32, ..bytemuck::Zeroable::zeroed() }
    }

    /// Writes a header and metadata at ring offset `at` (SLAB-2: before `head` passes it).
    fn put(&self, at: u64, mut header: FrameHeader, meta: &[u8], state: State) -> Option<()> {
        header.crc = header.checksum(meta);
        let word = self.map.state_word(at)?;
        let body = self.map.ring(at, FRAME_HEADER_LEN + meta.len() as u64)?;
        // SAFETY: the range is inside the ring and free (room was checked), and the job's lock is held (SLAB-1).
        unsafe {
            body.add(8).cast::<FrameHeader>().write_unaligned(header);
            std::ptr::copy_nonoverlapping(meta.as_ptr(), body.add(FRAME_HEADER_LEN as usize), meta.len());
        }
        protocol::commit(word, state);
        Some(())
    }

    /// The agent's count of releases before [`try_reserve`](Self::try_reserve) last looked for room.
    pub fn room_seen(&self) -> u32 {
        self.room_seen
    }

    /// Sleeps until the agent released something since `seen`, or `limit` passes (SLAB-6); whether it has.
    pub fn wait_for_room(map: &Mapping, seen: u32, limit: Duration) -> bool {
        let header = map.header();
        protocol::announce(&header.waiters);
        sleep(&header.room, seen, limit);
        protocol::retire(&header.waiters);
        protocol::releases(&header.room) != seen
    }

    /// Whether no tensor is under way in it: each holds the mapping. Nobody but the writer gives it out, so it stays so
    /// unless the writer is used again. What those tensors have counted is seen by whoever hears so (SYNC POINT F).
    pub fn is_idle(&mut self) -> bool {
        std::sync::Arc::get_mut(&mut self.map).is_some()
    }

    /// Nothing will be written here any more (SLAB-7).
    pub fn complete(&self) {
        let header = self.map.header();
        protocol::complete(&header.complete);
        ring_doorbell(header);
    }

    /// Whether this was said.
    pub fn is_complete(&self) -> bool {
        protocol::completed(&self.map.header().complete)
    }

    /// Whether the agent has accounted for all of it, so that it may go (SLAB-8).
    pub fn is_settled(&self) -> bool {
        protocol::settled(&self.map.header().settled)
    }

    /// Whether an agent has read something here.
    pub fn is_being_read(&self) -> bool {
        self.map.header().tail.load(Ordering::Acquire) > 0
    }

    /// Bytes that the agent has not released yet.
    pub fn in_flight(&self) -> u64 {
        self.head - self.map.header().tail.load(Ordering::Acquire)
    }
}

impl Reservation {
    /// The slab it lies in.
    pub fn mapping(&self) -> &std::sync::Arc<Mapping> {
        &self.map
    }

    /// Where the payload goes: 64-byte aligned, [`payload_len`](Self::payload_len) bytes.
    pub fn payload(&self) -> *mut u8 {
        self.payload
    }

    /// Bytes of payload.
    pub fn payload_len(&self) -> u64 {
        self.payload_len
    }

    /// Hands the frame to the agent.
    pub fn commit(mut self) {
        self.finish(State::Ready);
    }

    fn finish(&mut self, state: State) {
        self.done = true;
        if let Some(word) = self.map.state_word(self.at) {
            protocol::commit(word, state);
        }
        ring_doorbell(self.map.header());
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if !self.done {
            self.finish(State::Abandoned);
        }
    }
}

/// Tells a sleeping agent that there is something to read.
pub(super) fn ring_doorbell(header: &Header) {
    header.doorbell.fetch_add(1, Ordering::SeqCst);
    if header.agent_waits.load(Ordering::SeqCst) != 0 {
        wake(&header.doorbell);
    }
}
