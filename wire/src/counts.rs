//! How much each rank was to capture, in memory that outlives the ranks and their agent.
//!
//! `flexmodel run` makes it and names it to the job (see [`crate::env::COUNTS`]). A rank counts a tensor before it does
//! anything else with it, so whatever becomes of the rank, its slabs and the agent, `run` can tell how many tensors have
//! no line in the manifest: those are lost.
//!
//! | bytes | what |
//! |---|---|
//! | `0 .. 64` | [`MAGIC`], [`COUNTS_VERSION`] |
//! | `64 * n ..` | slot `n` from 1 to [`SLOTS`]: a rank plus one (0: free), its count |
//!
//! It is allocated and sealed when it is made: nobody who has it mapped can lose a page of it.

use std::{
    collections::BTreeMap,
    fs::OpenOptions,
    io,
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
    ptr::NonNull,
    sync::atomic::{AtomicU32, AtomicU64, Ordering},
};

/// First eight bytes.
pub const MAGIC: u64 = u64::from_le_bytes(*b"FLEXCNTS");
/// Version of everything in this module.
pub const COUNTS_VERSION: u32 = 1;
/// Ranks that have a count of their own. More than that share one.
pub const SLOTS: usize = 1023;

/// What is mapped.
#[repr(C, align(64))]
struct Memory {
    magic: u64,
    version: u32,
    slots: [Slot; SLOTS],
}

#[repr(C, align(64))]
struct Slot {
    /// The rank plus one; 0: nobody's yet.
    owner: AtomicU32,
    captured: AtomicU64,
}

const LEN: usize = size_of::<Memory>();
const SEALS: i32 = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW;

/// The counts, mapped.
#[derive(Debug)]
pub struct Counts {
    memory: NonNull<Memory>,
    /// Of who made them. Ranks have none to keep: the job may close it and open a file of its own there.
    fd: Option<OwnedFd>,
}

// SAFETY: all concurrent access goes through atomics; the rest is written before the memory is shared.
unsafe impl Send for Counts {}
// SAFETY: as for Send.
unsafe impl Sync for Counts {}

impl Counts {
    /// Makes them, all zero.
    ///
    /// # Errors
    /// The system has no memory, or refuses a memfd.
    pub fn create() -> io::Result<Self> {
        let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
        // SAFETY: a NUL-terminated name and known flags.
        let raw = unsafe { libc::memfd_create(c"flexmodel-counts".as_ptr(), flags) };
        if raw < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: memfd_create just gave us this descriptor.
        let fd = unsafe { OwnedFd::from_raw_fd(raw) };
        // SAFETY: fd is ours and allows sealing.
        let made = unsafe {
            libc::fallocate(raw, 0, 0, LEN as libc::off_t) == 0 && libc::fcntl(raw, libc::F_ADD_SEALS, SEALS) == 0
        };
        if !made {
            return Err(io::Error::last_os_error());
        }
        let mut counts = Self::map(&fd)?;
        counts.fd = Some(fd);
        // SAFETY: LEN bytes are mapped, and nobody else has them yet.
        unsafe {
            (&raw mut (*counts.memory.as_ptr()).magic).write(MAGIC);
            (&raw mut (*counts.memory.as_ptr()).version).write(COUNTS_VERSION);
        }
        Ok(counts)
    }

    /// What [`crate::env::COUNTS`] is in a job that is to count its captures for the agent at `agent`, which is what
    /// [`crate::env::AGENT`] says. It holds as long as this process has the counts.
    pub fn name(&self, agent: &str) -> String {
        let number = self.fd.as_ref().map_or(-1, AsRawFd::as_raw_fd);
        format!("/proc/{}/fd/{number} {agent}", std::process::id())
    }

    /// Those that `name` tells of. `None` if they are another agent's, gone, or not what we take them for: then nobody
    /// counts, and what an agent cannot tell of its losses stays untold.
    pub fn open(name: &str, agent: &str) -> Option<Self> {
        let (path, of) = name.split_once(' ')?;
        if of != agent {
            return None;
        }
        let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(path).ok()?;
        // SAFETY: the descriptor is open; what cannot be sealed answers -1.
        let seals = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GET_SEALS) };
        if seals < 0 || seals & SEALS != SEALS || file.metadata().ok()?.len() != LEN as u64 {
            return None;
        }
        let counts = Self::map(&file).ok()?;
        // SAFETY: LEN bytes are mapped and sealed; both fields were written before anybody had the descriptor.
        let (magic, version) = unsafe { ((*counts.memory.as_ptr()).magic, (*counts.memory.as_ptr()).version) };
        (magic == MAGIC && version == COUNTS_VERSION).then_some(counts)
    }

    fn map(fd: &impl AsRawFd) -> io::Result<Self> {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a fresh shared mapping of a descriptor we hold.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), LEN, access, libc::MAP_SHARED, fd.as_raw_fd(), 0) };
        match NonNull::new(base.cast::<Memory>()) {
            Some(memory) if base != libc::MAP_FAILED => Ok(Self { memory, fd: None }),
            _ => Err(io::Error::last_os_error()),
        }
    }

    fn slots(&self) -> &[Slot; SLOTS] {
        // SAFETY: LEN bytes are mapped as long as self lives; every field of a slot is an atomic.
        unsafe { &(*self.memory.as_ptr()).slots }
    }

    /// One more tensor that `rank` is to capture.
    pub fn captured(&self, rank: u32) {
        let home = rank as usize % SLOTS;
        let owner = rank.wrapping_add(1);
        let mine = |slot: &&Slot| match slot.owner.load(Ordering::Relaxed) {
            0 => {
                let claimed = slot.owner.compare_exchange(0, owner, Ordering::Relaxed, Ordering::Relaxed);
                claimed.is_ok() || claimed == Err(owner)
            }
            found => found == owner,
        };
        let (before, from_home) = self.slots().split_at(home);
        let slot = from_home.iter().chain(before).find(mine).or_else(|| from_home.first());
        if let Some(slot) = slot {
            slot.captured.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// What each rank has counted so far.
    pub fn by_rank(&self) -> BTreeMap<u32, u64> {
        let count = |slot: &Slot| {
            let owner = slot.owner.load(Ordering::Relaxed);
            (owner != 0).then(|| (owner - 1, slot.captured.load(Ordering::Relaxed)))
        };
        self.slots().iter().filter_map(count).collect()
    }
}

impl Drop for Counts {
    fn drop(&mut self) {
        // SAFETY: what mmap gave; nothing borrowed from self outlives it.
        unsafe { libc::munmap(self.memory.as_ptr().cast(), LEN) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AGENT: &str = "unix:/tmp/a folder/s";

    #[test]
    fn whoever_is_told_of_them_counts_in_them() {
        let counts = Counts::create().unwrap();
        let theirs = Counts::open(&counts.name(AGENT), AGENT).unwrap();
        for rank in [0, 3, 3, u32::try_from(SLOTS).unwrap(), 3] {
            theirs.captured(rank);
        }
        assert_eq!(counts.by_rank(), [(0, 1), (3, 3), (SLOTS as u32, 1)].into());
    }

    #[test]
    fn more_ranks_than_there_are_slots_are_all_counted() {
        let counts = Counts::create().unwrap();
        for rank in 0..2 * SLOTS as u32 {
            counts.captured(rank);
        }
        assert_eq!(counts.by_rank().values().sum::<u64>(), 2 * SLOTS as u64);
    }

    #[test]
    fn threads_that_claim_a_slot_at_once_lose_nothing() {
        let counts = Counts::create().unwrap();
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let counts = &counts;
                scope.spawn(move || (0..1000).for_each(|n| counts.captured((n + thread) % 7)));
            }
        });
        assert_eq!(counts.by_rank().values().sum::<u64>(), 4000);
        assert_eq!(counts.by_rank().len(), 7);
    }

    #[test]
    fn what_is_another_agents_or_no_counts_is_left_alone() {
        let counts = Counts::create().unwrap();
        assert!(Counts::open(&counts.name(AGENT), "unix:/tmp/other").is_none());
        let slab = crate::slab::SlabWriter::create(LEN as u64 - crate::slab::HEADER_LEN, 0).unwrap();
        let slab = slab.mapping().fd().unwrap().as_raw_fd();
        for name in ["", AGENT, &format!("/dev/zero {AGENT}"), &format!("/proc/self/fd/{slab} {AGENT}")] {
            assert!(Counts::open(name, AGENT).is_none(), "{name}");
        }
    }
}
