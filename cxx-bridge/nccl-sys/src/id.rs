//! What the ranks of one communicator have in common.

use std::{fmt, thread};

use crate::{Error, Nccl};

/// `ncclUniqueId`: where the ranks of one communicator meet. Rank 0 makes it and gives its bytes to the others; it must
/// live until all have joined, because they meet at a socket of its process.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct UniqueId([u8; Self::BYTES]);

impl UniqueId {
    /// `NCCL_UNIQUE_ID_BYTES`.
    pub const BYTES: usize = 128;

    /// A new one.
    pub fn new(nccl: &Nccl) -> Result<Self, Error> {
        let api = nccl.api().clone();
        // On a thread that is no one else's (NCCL-3).
        let make = move || {
            let mut id = Self([0; Self::BYTES]);
            // SAFETY: NCCL writes 128 bytes.
            let code = unsafe { (api.get_unique_id)(&mut id) };
            api.outcome("ncclGetUniqueId", code).map(|()| id)
        };
        let thread = thread::Builder::new().name("flexmodel-nccl".into()).spawn(make);
        let thread = thread.map_err(|e| Error::Thread(e.to_string()))?;
        thread.join().unwrap_or_else(|_| Err(Error::Thread("it has ended".into())))
    }

    /// To be carried to the other ranks. Whoever has them can join.
    pub fn as_bytes(&self) -> &[u8; Self::BYTES] {
        &self.0
    }
}

impl From<[u8; Self::BYTES]> for UniqueId {
    fn from(bytes: [u8; Self::BYTES]) -> Self {
        Self(bytes)
    }
}

impl TryFrom<&[u8]> for UniqueId {
    type Error = Error;

    fn try_from(bytes: &[u8]) -> Result<Self, Error> {
        let id = bytes.try_into().map_err(|_| {
            Error::Argument(format!(
                "a unique id has {} bytes, not {}: rank 0 did not write it whole",
                Self::BYTES,
                bytes.len()
            ))
        })?;
        Ok(Self(id))
    }
}

impl fmt::Debug for UniqueId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("UniqueId(..)")
    }
}
