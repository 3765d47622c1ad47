//! The bytes of a slab: header and frame header.

use bytemuck::{Pod, Zeroable};

use super::protocol::sync::{AtomicU32, AtomicU64};

/// First eight bytes of a slab.
pub const MAGIC: u64 = u64::from_le_bytes(*b"FLEXSLAB");
/// Version of everything in this module.
pub const SLAB_VERSION: u32 = 3;
/// Bytes before the ring.
pub const HEADER_LEN: u64 = 4096;
/// Frames start, and payloads start, at multiples of this.
pub const FRAME_ALIGN: u64 = 64;
/// Most metadata bytes in a frame.
pub const MAX_META: u32 = 64 << 10;

/// Start of the slab. Each group of fields that one side writes has cache lines of its own.
#[repr(C, align(64))]
pub struct Header {
    /// [`MAGIC`].
    pub magic: u64,
    /// [`SLAB_VERSION`].
    pub version: u32,
    /// Reserved, zero.
    pub reserved: u32,
    /// Bytes of the ring; a multiple of [`FRAME_ALIGN`].
    pub ring_len: u64,
    /// Process id of the job's rank.
    pub pid: u32,
    /// Global rank.
    pub rank: u32,
    /// Tells this slab from every other: a random number below 2^53.
    pub id: u64,
    _pad0: [u8; 24],
    /// Written by the job: bytes reserved so far.
    pub head: AtomicU64,
    /// Written by the job: rises with every commit; the agent's futex word.
    pub doorbell: AtomicU32,
    /// Written by the job, once: 1 when it writes nothing here any more (SLAB-7).
    pub complete: AtomicU32,
    /// Written by the job: tensors lost to a full slab, an absent agent or a failed copy.
    pub dropped: AtomicU64,
    /// Written by the job: tensors that have a number, so were to go through this slab.
    pub begun: AtomicU64,
    _pad2: [u8; 32],
    /// Written by the agent: bytes released so far.
    pub tail: AtomicU64,
    /// Written by the agent: rises with every release; the job's futex word.
    pub room: AtomicU32,
    /// Written by the agent: rises at least ten times a second while it lives, whatever its disk does.
    pub heartbeat: AtomicU32,
    /// Written by the agent, once: 1 when all of a complete slab is accounted for (SLAB-8).
    pub settled: AtomicU32,
    _pad3: [u8; 44],
    /// Threads of the job that sleep on `room`.
    pub waiters: AtomicU32,
    /// 1 while the agent sleeps on `doorbell`.
    pub agent_waits: AtomicU32,
    _pad4: [u8; 56],
}

/// Who owns a frame. Anything else in shared memory is hostile and treated as damage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum State {
    /// The job is writing it.
    Writing = 1,
    /// The agent may read it.
    Ready = 2,
    /// Nothing in it: the ring's unusable end.
    Pad = 3,
    /// The job gave it up after reserving it.
    Abandoned = 4,
}

impl State {
    /// The state with this code.
    pub fn from_code(code: u32) -> Option<Self> {
        [Self::Writing, Self::Ready, Self::Pad, Self::Abandoned].into_iter().find(|s| *s as u32 == code)
    }
}

/// A frame's header behind its state word, which takes the first 8 of [`FRAME_HEADER_LEN`] bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct FrameHeader {
    /// Which lap of the ring wrote this frame: `position / ring_len + 1`, low 32 bits.
    pub generation: u32,
    /// Bytes of metadata, directly behind this header; 0 on all pieces but a tensor's first.
    pub meta_len: u32,
    /// Bytes of the frame in all, a multiple of [`FRAME_ALIGN`].
    pub frame_len: u64,
    /// Number of the tensor in this slab, from 1.
    pub record: u64,
    /// Where this payload starts in the tensor's bytes.
    pub piece_offset: u64,
    /// Bytes of payload in this frame.
    pub payload_len: u64,
    /// Bytes of the whole tensor, over all of its pieces.
    pub total_len: u64,
    /// Reserved, zero.
    pub reserved: u32,
    /// crc32c of this header up to here, then the metadata.
    pub crc: u32,
}

/// Bytes of the state word and the frame header.
pub const FRAME_HEADER_LEN: u64 = 64;
const _: () = assert!(size_of::<FrameHeader>() == 56 && size_of::<Header>() <= HEADER_LEN as usize);

impl FrameHeader {
    /// Where the payload starts in a frame with this much metadata.
    pub fn payload_start(meta_len: u32) -> u64 {
        (FRAME_HEADER_LEN + u64::from(meta_len)).next_multiple_of(FRAME_ALIGN)
    }

    /// The crc over everything before `crc`, then `meta`.
    pub fn checksum(&self, meta: &[u8]) -> u32 {
        let bytes = bytemuck::bytes_of(self);
        let head = crc32c::crc32c(bytes.get(..52).unwrap_or(bytes));
        crc32c::crc32c_append(head, meta)
    }
}
