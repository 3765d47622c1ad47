//! The slab: a rank's shared memory, a ring of frames that carries tensor bytes to the agent.
//!
//! # Layout
//!
//! A memfd each. All positions are offsets; nothing is a pointer. A rank begins with a small slab. One that is full while
//! an agent reads it is followed by one twice as large: tensors that are under way end where they began, new ones begin
//! in the new slab.
//!
//! | bytes | what |
//! |---|---|
//! | `0 .. 4096` | [`Header`] |
//! | `4096 .. 4096 + ring_len` | the ring: frames, each a [`FrameHeader`], metadata, padding, payload |
//!
//! `head` and `tail` count bytes since the slab was made and never wrap; a position in the ring is the count modulo
//! `ring_len`. A frame never wraps: where it would, a [`State::Pad`] frame fills the ring to its end.
//!
//! # Invariants
//!
//! - **SLAB-1** Only the job moves `head`, under its own lock; only the agent moves `tail`; `tail <= head <= tail + ring_len`.
//! - **SLAB-2** A frame's header is written before `head` passes it, and its payload before its state becomes
//!   [`State::Ready`]. The agent reads a payload only after it saw `Ready`.
//! - **SLAB-3** The job writes to a frame only between reserving and committing it; the agent only reads, until it
//!   moves `tail`.
//! - **SLAB-4** The agent trusts nothing: it copies a header out, checks generation, bounds and crc, and only then uses it;
//!   it never looks for a second time at what it has checked.
//! - **SLAB-5** The memory is `fallocate`d (a full tmpfs is an error at creation, not a SIGBUS later) and sealed
//!   against shrinking and growing.
//! - **SLAB-6** A thread of the job that sleeps until there is room is woken by the next release, however many sleep.
//! - **SLAB-7** The job says that a slab is complete when another one has followed it and no tensor is under way in it.
//!   From then on it changes no byte of it. The agent asks for that before it looks whether the ring is empty.
//! - **SLAB-8** The job unmaps a complete slab when the agent has settled it, and tells every agent that it attaches to
//!   of all others. The agent settles a complete slab when it is empty and all that was begun in it is in the manifest,
//!   stored or lost. Each side unmaps for itself: neither can take memory away from the other.
//! - **SLAB-9** Of the tensors of a slab `begun` counts all, `dropped` those that the job gave up. The agent gives a line
//!   in the manifest to every other one: what has none when the slab is at its end was cut off, and is lost.
//! - **SLAB-10** Nor does the job trust the agent: a tail frees nothing that is behind the last one or ahead of the head, and
//!   nobody waits for an agent that has written one.
//!
//! The crc covers the frame's header and metadata. Payload bytes are summed by the agent as it writes them to disk,
//! so that the job pays for one copy and nothing else.

mod layout;
mod map;
#[cfg(any(fuzzing, test))]
pub mod meddle;
pub mod protocol;
mod reader;
mod writer;

pub use layout::{FRAME_ALIGN, FrameHeader, HEADER_LEN, Header, MAGIC, MAX_META, SLAB_VERSION, State};
pub use map::{Mapping, SlabError};
pub use reader::{Fetched, Frame, SlabReader};
pub use writer::{Reservation, SlabWriter};

#[cfg(test)]
mod tests;
