//! Writes run directories.
//!
//! | module | subject |
//! |---|---|
//! | [`dir`] | making, locking and refusing directories; `run.json` |
//! | `writer` | [`Store`]: where a part goes, its bytes, its line |
//! | `part`, `place`, `shard`, `recent` | a part under way; which bytes of which shard it gets; recent identities |
//! | [`account`] | which of a slab's tensors have a line |
//! | `journal` | the manifest as it grows, on a disk that may fill up |
//! | `seal` | turning a written shard into a safetensors file |
//! | [`recover`] | what an agent that died left behind |
//!
//! # Invariants
//!
//! - **STORE-1** A part's line is written after its bytes; a shard is sealed after the lines of all of its parts.
//! - **STORE-2** Bytes of a shard are allocated once: no two parts share a byte unless they are equal replicas.
//! - **STORE-3** A failing disk costs captures, each of them counted, and never an error to the job.
//! - **STORE-4** Whatever is in the manifest is readable after `kill -9` at any point, before and after recovery.
//! - **STORE-5** Every tensor of a slab that was read to its end has one line, or is counted in one: stored, refused or
//!   lost, over however many agents.
//!
//! # Memory
//!
//! A [`Store`] holds no tensor bytes. It holds at most `MAX_RESERVATIONS` unfinished wholes and
//! `MAX_REPLICAS` replicas to compare with, of `MAX_TABLE_BYTES` each, `MAX_RECENT` hashes of
//! identities (4 MiB), and for each shard that is not sealed yet the entries of its header, whose names fit into
//! [`HEADER_SPACE`](crate::format::HEADER_SPACE) (1 MiB); at most `MAX_RIPE` and `MAX_UNSEALED` shards wait for that; and what
//! [`joining`](crate::joining) knows of passes, with the parts that wait for it. With names of usual length that is some MiB in
//! all.

pub mod account;
pub mod dir;
mod journal;
mod part;
mod place;
mod recent;
pub mod recover;
mod seal;
mod shard;
#[cfg(test)]
mod tests;
mod writer;

pub use part::{Outcome, PartWriter};
pub use writer::{DEFAULT_SHARD_BYTES, Options, Store};
