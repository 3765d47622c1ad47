//! Point-to-point transfers between ranks, over the NCCL that torch has loaded.
//!
//! Nothing is linked and nothing is loaded: where the process has no `libnccl.so.2`, [`Nccl::loaded`] says so. What
//! is bound is what FlexModel calls: an id, a communicator of its own, groups of sends and receives of bytes, and the
//! end of it all. Gathering a tensor needs no more, and bytes need no type.
//!
//! ```no_run
//! # use std::time::{Duration, Instant};
//! # fn make_device_current() -> Result<(), String> { Ok(()) }
//! # fn example(bytes: [u8; 128], piece: *const u8, stream: nccl_sys::Stream) -> Result<(), nccl_sys::Error> {
//! let nccl = nccl_sys::Nccl::loaded()?;
//! let id = nccl_sys::UniqueId::from(bytes); // rank 0 made it, by UniqueId::new
//! let soon = || Instant::now() + Duration::from_secs(10);
//! let mut comm = nccl_sys::Comm::join(&nccl, id, 2, 1, soon(), make_device_current)?;
//! // SAFETY: `piece` is 64 bytes of this device, and stays until the stream has passed the group.
//! comm.group(soon(), |group| unsafe { group.send(piece, 64, 0, stream) })?;
//! comm.wait(soon(), || Ok(true /* an event recorded on the stream now has come */))?;
//! # Ok(())
//! # }
//! ```
//!
//! # Invariants
//!
//! - **NCCL-1** Every call of a communicator returns, at the latest [`GRACE`] after its deadline, whatever the other
//!   ranks and NCCL do.
//! - **NCCL-2** After the first error a communicator is aborted, and every further call returns that error at once. No
//!   transfer is made again: the ranks would not agree which one it is.
//! - **NCCL-3** NCCL is called on a thread of the communicator's own, or one made for the call. NCCL keeps the depth of groups, and what is
//!   wrong with the open one, per thread. On a thread of the job, a tap inside of the job's group would become part of
//!   it, and NCCL fails a group that has blocking communicators, which the job's are, and others, which ours are; and
//!   an NCCL call that fails can leave a group open, which would swallow the job's next.
//!
//! A group has *returned* when NCCL has put it on the stream, not when its bytes have moved: [`Comm::wait`] for an
//! event behind it. The first group between two ranks connects them, and thus needs both of them to return at all.

mod api;
mod comm;
mod error;
mod group;
mod id;
mod worker;

pub use api::{Nccl, Version};
pub use comm::{Comm, GRACE};
pub use error::{Error, Failure};
pub use group::{Group, Stream};
pub use id::UniqueId;
pub use worker::Nap;
