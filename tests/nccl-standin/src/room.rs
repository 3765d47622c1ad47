//! Shared memory where the ranks of one communicator meet.

use std::{
    ffi::CString,
    io,
    ptr::NonNull,
    sync::atomic::{AtomicU32, Ordering},
};

use crate::{
    code, log,
    ring::{self, Ring},
};

/// Most ranks of a communicator.
pub const MOST: usize = 16;
/// The room's bytes: only the pages of rings that are used take memory.
const BYTES: usize = size_of::<Head>() + MOST * MOST * ring::BYTES;

/// A rank has not come.
pub const ABSENT: u32 = 0;
/// It is here.
pub const HERE: u32 = 1;
/// It ended in good order.
pub const LEFT: u32 = 2;
/// It aborted.
pub const ABORTED: u32 = 3;

/// `ncclUniqueId`.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Id([u8; 128]);

impl Id {
    const MARK: &[u8; 8] = b"standin:";

    /// Names a room that no one else has.
    pub fn random() -> Result<Self, i32> {
        let mut id = [0; 128];
        id[..8].copy_from_slice(Self::MARK);
        // SAFETY: 16 bytes lie behind the mark.
        let got = unsafe { libc::getrandom(id[8..].as_mut_ptr().cast(), 16, 0) };
        if got == 16 { Ok(Self(id)) } else { Err(code::SYSTEM) }
    }

    /// No one's.
    #[cfg(test)]
    pub fn zero() -> Self {
        Self([0; 128])
    }

    fn name(&self) -> Result<CString, String> {
        if !self.0.starts_with(Self::MARK) {
            return Err("the unique id is not one of the stand-in's: its bytes did not come over".into());
        }
        let hex: String = self.0[8..24].iter().map(|byte| format!("{byte:02x}")).collect();
        CString::new(format!("/flexmodel-nccl-standin-{hex}")).map_err(|e| e.to_string())
    }
}

/// What begins the room. All zero is its first state.
#[repr(C, align(64))]
struct Head {
    size: AtomicU32,
    broken: AtomicU32,
    ranks: [AtomicU32; MOST],
}

/// A mapped room.
pub struct Room {
    base: NonNull<u8>,
    name: CString,
    size: usize,
    rank: usize,
}

// SAFETY: the memory is mapped for the life of the room; its head is atomics, and each ring is used by the two threads
// that `Ring` allows.
unsafe impl Send for Room {}
// SAFETY: as above.
unsafe impl Sync for Room {}

impl Room {
    /// Maps the room, which the first to come makes, and takes `rank`'s place of `size`.
    pub fn enter(id: &Id, size: usize, rank: usize) -> Result<Self, String> {
        let name = id.name()?;
        let room = Self { base: map(&name).map_err(|e| format!("shared memory: {e}"))?, name, size, rank };
        let ours = size as u32;
        let theirs =
            room.head().size.compare_exchange(0, ours, Ordering::AcqRel, Ordering::Acquire).unwrap_or_else(|n| n);
        if theirs != 0 && theirs != ours {
            return Err(format!("joins as one of {ours} ranks, and another as one of {theirs}"));
        }
        if room.head().ranks[rank].swap(HERE, Ordering::AcqRel) != ABSENT {
            return Err("another process has joined as this rank".into());
        }
        Ok(room)
    }

    /// Whether every rank has come. The room's name goes then: whatever dies from now on leaves nothing behind.
    pub fn is_full(&self) -> bool {
        let full = (0..self.size).all(|rank| self.state_of(rank) != ABSENT);
        if full {
            self.unlink();
        }
        full
    }

    /// What a rank has become.
    pub fn state_of(&self, rank: usize) -> u32 {
        self.head().ranks[rank].load(Ordering::Acquire)
    }

    /// This rank leaves.
    pub fn leave(&self, state: u32) {
        self.head().ranks[self.rank].store(state, Ordering::Release);
        self.unlink();
    }

    /// A violation between ranks: the others need not wait for what cannot come.
    pub fn break_up(&self, why: &str) {
        log::violation(Some(self.rank), why);
        self.head().broken.store(1, Ordering::Release);
    }

    /// Whether a rank found a violation.
    pub fn is_broken(&self) -> bool {
        self.head().broken.load(Ordering::Acquire) != 0
    }

    /// The ring that carries what `from` sends to `to`.
    pub fn ring(&self, from: usize, to: usize) -> Ring {
        // SAFETY: ranks are below MOST, so it is a ring of this room, which outlives its communicator's thread.
        unsafe { Ring::at(self.base.add(size_of::<Head>() + (from * MOST + to) * ring::BYTES)) }
    }

    fn head(&self) -> &Head {
        // SAFETY: the mapping begins with it, page-aligned, and any bytes are a valid one.
        unsafe { self.base.cast().as_ref() }
    }

    fn unlink(&self) {
        // SAFETY: a C string. Most times it is gone already.
        unsafe { libc::shm_unlink(self.name.as_ptr()) };
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        // SAFETY: mapped by `map` with this length, and no ring of it is in use any more.
        unsafe { libc::munmap(self.base.as_ptr().cast(), BYTES) };
    }
}

fn map(name: &CString) -> io::Result<NonNull<u8>> {
    // SAFETY: a C string.
    let fd = unsafe { libc::shm_open(name.as_ptr(), libc::O_CREAT | libc::O_RDWR | libc::O_CLOEXEC, 0o600) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: our descriptor. Every rank sets the same length, which changes nothing but the first time.
    let sized = unsafe { libc::ftruncate(fd, BYTES as libc::off_t) };
    // SAFETY: a new mapping of our descriptor.
    let base =
        unsafe { libc::mmap(std::ptr::null_mut(), BYTES, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED, fd, 0) };
    let error = io::Error::last_os_error();
    // SAFETY: our descriptor, used no more.
    unsafe { libc::close(fd) };
    match NonNull::new(base.cast::<u8>()) {
        Some(base) if sized == 0 && base.as_ptr().cast() != libc::MAP_FAILED => Ok(base),
        _ => Err(error),
    }
}
