//! The agent's side of a slab. Every byte is hostile (SLAB-4).

use std::{os::fd::OwnedFd, sync::Arc, sync::atomic::Ordering, time::Duration};

use super::{
    layout::{FRAME_ALIGN, FRAME_HEADER_LEN, FrameHeader, MAX_META, State},
    map::{Mapping, SlabError, sleep, wake},
    protocol,
};

/// Looks that a reader takes on its own after the last frame, each after twice the time, before it has to be woken.
const GLANCES: u32 = 3;
/// Before the first of them.
const GLANCE: Duration = Duration::from_micros(200);

/// Reads frames in order.
#[derive(Debug)]
pub struct SlabReader {
    map: Arc<Mapping>,
    tail: u64,
    /// Length of the frame that was looked at last, as it was then.
    shown: Option<u64>,
    /// Waits since the last frame.
    idle: u32,
}

/// One frame, checked. Its payload stays valid until [`SlabReader::release`].
#[derive(Debug)]
pub struct Frame<'a> {
    /// Number of the tensor in this slab.
    pub record: u64,
    /// Encoded [`crate::record::RecordMeta`]; empty on later pieces.
    pub meta: Vec<u8>,
    /// Where the payload starts in the tensor's bytes.
    pub piece_offset: u64,
    /// Bytes of the whole tensor.
    pub total_len: u64,
    /// The payload. The job could still scribble on it: that changes bytes, never bounds.
    pub payload: &'a [u8],
}

/// What is at the reader's position.
#[derive(Debug)]
pub enum Fetched<'a> {
    /// A frame. Release it when its bytes are safe.
    Frame(Frame<'a>),
    /// Nothing yet.
    Empty,
    /// A frame that the job is still writing.
    Pending,
}

impl SlabReader {
    /// Takes over a slab, continuing where the last agent stopped.
    pub fn attach(fd: OwnedFd) -> Result<Self, SlabError> {
        let map = Mapping::attach(fd)?;
        let header = map.header();
        let (tail, head) = (header.tail.load(Ordering::Acquire), protocol::published(&header.head));
        if tail > head || head - tail > map.ring_len() || !tail.is_multiple_of(FRAME_ALIGN) {
            return Err(SlabError::Foreign(format!(
                "tail {tail} and head {head} do not fit a ring of {}",
                map.ring_len()
            )));
        }
        Ok(Self { map: Arc::new(map), tail, shown: None, idle: 0 })
    }

    /// The memory, for heartbeats from another thread.
    pub fn mapping(&self) -> &Arc<Mapping> {
        &self.map
    }

    /// Looks at the next frame, skipping what holds nothing. Damage is an error: the slab is then of no more use.
    pub fn fetch(&mut self) -> Result<Fetched<'_>, SlabError> {
        self.shown = None;
        let (ring, start) = (self.map.ring_len(), self.tail);
        loop {
            let head = protocol::published(&self.map.header().head);
            // Nor may a job keep us here that goes on and on writing frames that hold nothing.
            if head == self.tail || self.tail - start > ring {
                return Ok(Fetched::Empty);
            }
            if head < self.tail || head - self.tail > ring || !head.is_multiple_of(FRAME_ALIGN) {
                return Err(damage("head outside the ring", self.tail));
            }
            let at = self.tail % ring;
            let state = self.map.state_word(at).and_then(protocol::state);
            let header = self.header(at)?;
            if header.generation != (self.tail / ring + 1) as u32 {
                return Err(damage("a frame of another generation", self.tail));
            }
            let room = (ring - at).min(head - self.tail);
            if header.frame_len < FRAME_HEADER_LEN
                || header.frame_len > room
                || !header.frame_len.is_multiple_of(FRAME_ALIGN)
            {
                return Err(damage("a frame longer than its ring", self.tail));
            }
            match state {
                None => return Err(damage("an unknown frame state", self.tail)),
                Some(State::Writing) => {
                    self.shown = Some(header.frame_len);
                    return Ok(Fetched::Pending);
                }
                Some(State::Pad | State::Abandoned) => self.release_len(header.frame_len),
                Some(State::Ready) => {
                    self.idle = 0;
                    let (meta, payload) = self.body(at, &header)?;
                    self.shown = Some(header.frame_len);
                    // SAFETY: body checked that the range lies inside the ring; it stays mapped while self does, and
                    // the job does not write to a Ready frame (SLAB-3).
                    let payload = unsafe { std::slice::from_raw_parts(payload, header.payload_len as usize) };
                    return Ok(Fetched::Frame(Frame {
                        record: header.record,
                        meta,
                        piece_offset: header.piece_offset,
                        total_len: header.total_len,
                        payload,
                    }));
                }
            }
        }
    }

    /// Whether the job writes nothing here any more (SLAB-7). To be asked *before* [`fetch`](Self::fetch): what is empty
    /// then stays empty, and the counters are final.
    pub fn is_complete(&self) -> bool {
        protocol::completed(&self.map.header().complete)
    }

    /// Tells the job that everything in this complete slab is accounted for (SLAB-8).
    pub fn settle(&self) {
        protocol::settle(&self.map.header().settled);
    }

    /// Gives the frame that [`fetch`](Self::fetch) found back to the job, by the length that was checked: what its header
    /// says by now counts for nothing. An error if the last look found none.
    pub fn release(&mut self) -> Result<(), SlabError> {
        let len = self.shown.take().ok_or_else(|| damage("no frame to give back", self.tail))?;
        self.release_len(len);
        Ok(())
    }

    fn release_len(&mut self, len: u64) {
        self.tail += len;
        let header = self.map.header();
        protocol::release(&header.tail, self.tail);
        if protocol::released(&header.room, &header.waiters) {
            wake(&header.room);
        }
    }

    /// A private copy of the frame header at ring offset `at`.
    fn header(&self, at: u64) -> Result<FrameHeader, SlabError> {
        let from = self
            .map
            .ring(at, FRAME_HEADER_LEN)
            .ok_or_else(|| damage("a frame header past the ring's end", self.tail))?;
        // SAFETY: 64 bytes are inside the ring; any bit pattern is a FrameHeader.
        Ok(unsafe { from.add(8).cast::<FrameHeader>().read_unaligned() })
    }

    fn body(&self, at: u64, header: &FrameHeader) -> Result<(Vec<u8>, *const u8), SlabError> {
        let bad = |why| move || damage(why, self.tail);
        if header.meta_len > MAX_META {
            return Err(bad("metadata too long")());
        }
        let start = FrameHeader::payload_start(header.meta_len);
        let fits = start.checked_add(header.payload_len).is_some_and(|end| end <= header.frame_len);
        let in_total = header.piece_offset.checked_add(header.payload_len).is_some_and(|end| end <= header.total_len);
        if !fits || !in_total {
            return Err(bad("a payload longer than its frame or tensor")());
        }
        let meta_at = self
            .map
            .ring(at + FRAME_HEADER_LEN, u64::from(header.meta_len))
            .ok_or_else(bad("metadata past the ring"))?;
        let mut meta = vec![0; header.meta_len as usize];
        // SAFETY: the range was checked against the ring just above.
        unsafe { std::ptr::copy_nonoverlapping(meta_at, meta.as_mut_ptr(), meta.len()) };
        if header.checksum(&meta) != header.crc {
            return Err(bad("a frame whose crc does not match")());
        }
        let payload = self.map.ring(at + start, header.payload_len).ok_or_else(bad("payload past the ring"))?;
        Ok((meta, payload))
    }

    /// Sleeps until the job commits something or `limit` passes. The first few sleeps after a frame are short ones that
    /// nobody has to end: waking us costs the job more than a small tensor does, and more are likely on their way.
    pub fn wait(&mut self, limit: Duration) {
        if self.idle < GLANCES {
            std::thread::sleep(limit.min(GLANCE * (1 << self.idle)));
            self.idle += 1;
            return;
        }
        let header = self.map.header();
        let seen = header.doorbell.load(Ordering::SeqCst);
        header.agent_waits.store(1, Ordering::SeqCst);
        let idle = protocol::published(&header.head) == self.tail
            || self.map.state_word(self.tail % self.map.ring_len()).and_then(protocol::state) == Some(State::Writing);
        if idle && !self.is_complete() && header.doorbell.load(Ordering::SeqCst) == seen {
            sleep(&header.doorbell, seen, limit);
        }
        header.agent_waits.store(0, Ordering::SeqCst);
    }

    /// Tells the job that this agent lives.
    pub fn beat(map: &Mapping) {
        map.header().heartbeat.fetch_add(1, Ordering::Release);
    }
}

fn damage(what: &str, at: u64) -> SlabError {
    SlabError::Foreign(format!("{what} at position {at}"))
}
