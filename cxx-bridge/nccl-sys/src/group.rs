//! Transfers that are made together.

use std::ffi::c_void;

use crate::Error;

/// `cudaStream_t`, which is `CUstream`: the stream that NCCL puts a transfer on.
pub type Stream = *mut c_void;

/// The transfers of one [`crate::Comm::group`]. They progress together. Between two ranks, the sends of one are matched
/// with the receives of the other in order.
pub struct Group {
    pub(crate) transfers: Vec<Transfer>,
    pub(crate) wrong: Option<Error>,
    size: usize,
}

/// One `ncclSend` or `ncclRecv`.
pub(crate) struct Transfer {
    pub(crate) way: Way,
    pub(crate) bytes: usize,
    pub(crate) peer: i32,
    pub(crate) stream: Stream,
}

pub(crate) enum Way {
    Send(*const c_void),
    Recv(*mut c_void),
}

// SAFETY: addresses, which NCCL takes on any thread; whoever made the transfer vouched for what they point to.
unsafe impl Send for Transfer {}

impl Group {
    pub(crate) fn new(size: usize) -> Self {
        Self { transfers: Vec::new(), wrong: None, size }
    }

    /// Sends `bytes` bytes to a rank, which must receive as many. Of no bytes nothing is sent, nor received.
    ///
    /// # Safety
    /// `from` has `bytes` bytes that the communicator's device can read, until `stream` has passed the group, or an
    /// abort of it: for ever after [`Error::Stuck`]. `stream` is a stream of that device.
    pub unsafe fn send(&mut self, from: *const u8, bytes: usize, peer: usize, stream: Stream) {
        self.add(Way::Send(from.cast()), bytes, peer, stream);
    }

    /// Receives `bytes` bytes from a rank, which must send as many.
    ///
    /// # Safety
    /// As for [`Self::send`]; the device can write `to`, and no one else reads or writes it meanwhile.
    pub unsafe fn recv(&mut self, to: *mut u8, bytes: usize, peer: usize, stream: Stream) {
        self.add(Way::Recv(to.cast()), bytes, peer, stream);
    }

    fn add(&mut self, way: Way, bytes: usize, peer: usize, stream: Stream) {
        match i32::try_from(peer) {
            Ok(known) if peer < self.size => {
                if bytes > 0 {
                    self.transfers.push(Transfer { way, bytes, peer: known, stream });
                }
            }
            _ => {
                let why = format!("a transfer with rank {peer} of a communicator of {} ranks", self.size);
                self.wrong.get_or_insert(Error::Argument(why));
            }
        }
    }
}
