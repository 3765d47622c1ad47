//! Making and mapping the memfd.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    ptr::NonNull,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use super::{
    layout::{FRAME_ALIGN, HEADER_LEN, Header, MAGIC, SLAB_VERSION},
    protocol::sync::AtomicU32,
};
use crate::descriptor::Descriptor;

/// Why a slab could not be made or taken.
#[derive(Debug, thiserror::Error)]
pub enum SlabError {
    /// The system refused memory.
    #[error("{what} of {bytes} bytes of shared memory failed: {source}")]
    System {
        /// The call.
        what: &'static str,
        /// Its size.
        bytes: u64,
        /// The system's reason.
        source: io::Error,
    },
    /// The process may not make shared memory at all.
    #[error("this process may not make shared memory ({what}: {source}), as under a seccomp filter")]
    Forbidden {
        /// The call.
        what: &'static str,
        /// The system's reason.
        source: io::Error,
    },
    /// The memory is not a slab of ours, or damaged.
    #[error("not a usable slab: {0}")]
    Foreign(String),
}

/// A mapped slab. Dropping it unmaps; the memory lives as long as any process holds it.
#[derive(Debug)]
pub struct Mapping {
    base: NonNull<u8>,
    len: usize,
    ring_len: u64,
    memory: Descriptor,
    stays: AtomicBool,
}

// SAFETY: the memory is shared with another process anyway; all concurrent access goes through atomics or follows
// SLAB-2 and SLAB-3.
unsafe impl Send for Mapping {}
// SAFETY: as for Send.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Makes a slab with a ring of about `bytes` for `rank`: memfd, fallocate, seals, populated pages (SLAB-5).
    pub fn create(bytes: u64, rank: u32) -> Result<Self, SlabError> {
        let ring_len = bytes.max(FRAME_ALIGN * 4).next_multiple_of(4096);
        let len = ring_len + HEADER_LEN;
        let fail = |what| move || failed(what, len)(io::Error::last_os_error());
        // SAFETY: a NUL-terminated name and known flags.
        let raw =
            unsafe { libc::memfd_create(c"flexmodel-slab".as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING) };
        if raw < 0 {
            return Err(fail("memfd_create")());
        }
        // SAFETY: memfd_create just gave us this descriptor.
        let memory = Descriptor::keep(unsafe { OwnedFd::from_raw_fd(raw) }).map_err(failed("fstat", len))?;
        let raw = memory.get().map_err(failed("fstat", len))?.as_raw_fd();
        // SAFETY: fd is ours.
        if unsafe { libc::fallocate(raw, 0, 0, len as libc::off_t) } != 0 {
            return Err(fail("fallocate")());
        }
        let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
        // SAFETY: fd is ours and allows sealing.
        if unsafe { libc::fcntl(raw, libc::F_ADD_SEALS, seals) } != 0 {
            return Err(fail("sealing")());
        }
        let map = Self::map(memory, len, ring_len, true)?;
        // SAFETY: the mapping is at least HEADER_LEN long, page aligned, and nobody else has it yet.
        unsafe {
            let header = map.base.as_ptr().cast::<Header>();
            (&raw mut (*header).magic).write(MAGIC);
            (&raw mut (*header).version).write(SLAB_VERSION);
            (&raw mut (*header).ring_len).write(ring_len);
            (&raw mut (*header).pid).write(std::process::id());
            (&raw mut (*header).rank).write(rank);
            (&raw mut (*header).id).write(random_id());
        }
        Ok(map)
    }

    /// Maps a slab that another process made. Refuses what is not sealed, not of this version or not of its own size.
    pub fn attach(fd: OwnedFd) -> Result<Self, SlabError> {
        let memory = Descriptor::keep(fd).map_err(failed("fstat", 0))?;
        let raw = memory.get().map_err(failed("fstat", 0))?.as_raw_fd();
        // SAFETY: fd is open; a descriptor that cannot be sealed answers -1.
        let seals = unsafe { libc::fcntl(raw, libc::F_GET_SEALS) };
        if seals < 0 || seals & libc::F_SEAL_SHRINK == 0 {
            return Err(SlabError::Foreign("the memory is not sealed against shrinking".into()));
        }
        // SAFETY: stat is plain data; fd is open.
        let mut stat: libc::stat = unsafe { std::mem::zeroed() };
        // SAFETY: as above.
        if unsafe { libc::fstat(raw, &mut stat) } != 0 {
            return Err(SlabError::System { what: "fstat", bytes: 0, source: io::Error::last_os_error() });
        }
        let len = stat.st_size as u64;
        if len < HEADER_LEN + FRAME_ALIGN {
            return Err(SlabError::Foreign(format!("{len} bytes are too few")));
        }
        // The ring is as long as the memory says, which is sealed; the header has to agree, and may change its mind.
        let map = Self::map(memory, len, len - HEADER_LEN, false)?;
        let header = map.header();
        let (magic, version, ring_len) = (header.magic, header.version, header.ring_len);
        if magic != MAGIC {
            return Err(SlabError::Foreign("wrong magic".into()));
        }
        if version != SLAB_VERSION {
            return Err(SlabError::Foreign(format!("version {version}, this agent speaks {SLAB_VERSION}")));
        }
        if ring_len == 0 || ring_len % FRAME_ALIGN != 0 || ring_len != len - HEADER_LEN {
            return Err(SlabError::Foreign(format!("a ring of {ring_len} bytes in {len} bytes of memory")));
        }
        Ok(map)
    }

    fn map(memory: Descriptor, len: u64, ring_len: u64, populate: bool) -> Result<Self, SlabError> {
        let fd = memory.get().map_err(failed("mmap", len))?.as_raw_fd();
        let flags = libc::MAP_SHARED | if populate { libc::MAP_POPULATE } else { 0 };
        // SAFETY: a fresh shared mapping of a descriptor we hold.
        let base =
            unsafe { libc::mmap(std::ptr::null_mut(), len as usize, libc::PROT_READ | libc::PROT_WRITE, flags, fd, 0) };
        match NonNull::new(base.cast::<u8>()) {
            Some(base) if base.as_ptr().cast() != libc::MAP_FAILED => {
                // Tensors have no place in a core dump, nor has its size in a disk. Where it is refused, they are in it.
                // SAFETY: the range was just mapped; the advice changes no byte of it.
                unsafe { libc::madvise(base.as_ptr().cast(), len as usize, libc::MADV_DONTDUMP) };
                Ok(Self { base, len: len as usize, ring_len, memory, stays: AtomicBool::new(false) })
            }
            _ => Err(failed("mmap", len)(io::Error::last_os_error())),
        }
    }

    /// The header.
    pub fn header(&self) -> &Header {
        #[cfg(any(fuzzing, test))]
        super::meddle::now();
        // SAFETY: the mapping is page aligned and longer than the header (create, attach). The fields that change are
        // atomics; the plain ones are written before the memory is shared.
        unsafe { self.base.cast::<Header>().as_ref() }
    }

    /// Bytes of the ring, checked against the size of the memory.
    pub fn ring_len(&self) -> u64 {
        self.ring_len
    }

    /// Address and length of the whole mapping, for pinning it to a device.
    pub fn whole(&self) -> (*mut u8, usize) {
        (self.base.as_ptr(), self.len)
    }

    /// The memfd, to send to the agent; an error if the job has closed it. The memory stays.
    pub fn fd(&self) -> io::Result<BorrowedFd<'_>> {
        self.memory.get()
    }

    /// A device may write to it from now on: it stays mapped as long as the process lives.
    pub fn keep_mapped(&self) {
        self.stays.store(true, Ordering::Relaxed);
    }

    /// Pointer to ring offset `at` for `len` bytes; `None` if that leaves the ring.
    pub(super) fn ring(&self, at: u64, len: u64) -> Option<*mut u8> {
        #[cfg(any(fuzzing, test))]
        super::meddle::now();
        let end = at.checked_add(len)?;
        // SAFETY: HEADER_LEN + ring_len bytes are mapped and at + len <= ring_len.
        (end <= self.ring_len).then(|| unsafe { self.base.as_ptr().add((HEADER_LEN + at) as usize) })
    }

    /// The state word of the frame at ring offset `at`.
    pub(super) fn state_word(&self, at: u64) -> Option<&AtomicU32> {
        let word = self.ring(at, super::layout::FRAME_HEADER_LEN)?;
        // SAFETY: inside the ring; frames are aligned to 64 bytes and the word is only ever used as an atomic.
        at.is_multiple_of(FRAME_ALIGN).then(|| unsafe { &*word.cast::<AtomicU32>() })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if self.stays.load(Ordering::Relaxed) {
            return;
        }
        // SAFETY: base and len are what mmap gave; nothing borrowed from self outlives it.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

fn failed(what: &'static str, bytes: u64) -> impl Fn(io::Error) -> SlabError {
    move |source| match source.raw_os_error() {
        Some(libc::EPERM | libc::EACCES | libc::ENOSYS) => SlabError::Forbidden { what, source },
        _ => SlabError::System { what, bytes, source },
    }
}

/// A number that tells slabs apart, small enough for every reader of JSON.
fn random_id() -> u64 {
    let mut bytes = [0u8; 8];
    // SAFETY: the buffer is valid for its length. A kernel without randomness leaves it as it is.
    let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), libc::GRND_NONBLOCK) };
    let mut id = u64::from_le_bytes(bytes);
    if got != bytes.len() as isize {
        let now = std::time::UNIX_EPOCH.elapsed().map_or(0, |since| since.as_nanos() as u64);
        id = now.wrapping_mul(u64::from(std::process::id()) | 1);
    }
    id >> 11
}

/// Sleeps until `word` is no longer `seen`, somebody [`wake`]s it, or `limit` passes. Works across processes.
pub(super) fn sleep(word: &AtomicU32, seen: u32, limit: Duration) {
    let limit =
        libc::timespec { tv_sec: limit.as_secs() as libc::time_t, tv_nsec: libc::c_long::from(limit.subsec_nanos()) };
    // SAFETY: the word is valid for the call; FUTEX_WAIT only compares it. Any outcome is fine: callers look again.
    unsafe { libc::syscall(libc::SYS_futex, std::ptr::from_ref(word), libc::FUTEX_WAIT, seen, &raw const limit) };
}

/// Wakes every sleeper on `word`.
pub(super) fn wake(word: &AtomicU32) {
    // SAFETY: as for sleep.
    unsafe { libc::syscall(libc::SYS_futex, std::ptr::from_ref(word), libc::FUTEX_WAKE, i32::MAX) };
}
