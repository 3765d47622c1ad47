//! A [`Register`] in shared memory: of ranks that have one agent, which makes it.
//!
//! It is a page that is sealed against every change of its size, so that nobody who has it mapped can lose it. It lives as long
//! as anybody has it mapped, whatever becomes of who made it.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    ptr::NonNull,
    sync::atomic::{AtomicU32, Ordering},
};

use crate::revision::{Register, Verdict};

const LEN: usize = 4096;
const SEALS: i32 = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW;
/// An *open* register is one that nobody wrote to.
const OPEN: u32 = 0;
const COMMIT: u32 = 1;
const ABANDONED: u32 = 2;

/// The register, mapped.
#[derive(Debug)]
pub struct SharedRegister(NonNull<AtomicU32>);

// SAFETY: all access goes through the atomic.
unsafe impl Send for SharedRegister {}

impl SharedRegister {
    /// Makes one that is open, and the descriptor by which ranks [`attach`](Self::attach) to it.
    ///
    /// # Errors
    /// The system has no memory, or refuses a memfd.
    pub fn create() -> io::Result<(Self, OwnedFd)> {
        let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
        // SAFETY: a NUL-terminated name and known flags.
        let raw = unsafe { libc::memfd_create(c"flexmodel-register".as_ptr(), flags) };
        if raw < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: memfd_create just gave us this descriptor.
        let fd = unsafe { OwnedFd::from_raw_fd(raw) };
        // SAFETY: fd is ours and allows sealing.
        let made = unsafe {
            libc::fallocate(raw, 0, 0, LEN as libc::off_t) == 0 && libc::fcntl(raw, libc::F_ADD_SEALS, SEALS) == 0
        };
        if made { Ok((Self::map(fd.as_fd())?, fd)) } else { Err(io::Error::last_os_error()) }
    }

    /// Maps one that another process made.
    ///
    /// # Errors
    /// It is none of ours, or cannot be mapped.
    pub fn attach(fd: OwnedFd) -> io::Result<Self> {
        // SAFETY: fd is open; a descriptor that cannot be sealed answers -1.
        let seals = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GET_SEALS) };
        // SAFETY: stat is plain data.
        let mut stat: libc::stat = unsafe { std::mem::zeroed() };
        // SAFETY: fd is open and the buffer is a stat.
        let known = unsafe { libc::fstat(fd.as_raw_fd(), &raw mut stat) } == 0;
        if seals < 0 || seals & SEALS != SEALS || !known || stat.st_size != LEN as libc::off_t {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the memory is not a register"));
        }
        Self::map(fd.as_fd())
    }

    fn map(fd: BorrowedFd<'_>) -> io::Result<Self> {
        let (protection, null) = (libc::PROT_READ | libc::PROT_WRITE, std::ptr::null_mut());
        // SAFETY: a fresh shared mapping of a descriptor that is open.
        let base = unsafe { libc::mmap(null, LEN, protection, libc::MAP_SHARED, fd.as_raw_fd(), 0) };
        match NonNull::new(base.cast::<AtomicU32>()) {
            Some(word) if base != libc::MAP_FAILED => Ok(Self(word)),
            _ => Err(io::Error::last_os_error()),
        }
    }

    fn word(&self) -> &AtomicU32 {
        // SAFETY: the page is mapped and aligned, and stays so as long as this lives.
        unsafe { self.0.as_ref() }
    }
}

impl Register for SharedRegister {
    fn settle(&self, verdict: Verdict) -> Option<Verdict> {
        let word = match verdict {
            Verdict::Open => return Some(self.peek()),
            Verdict::Commit => COMMIT,
            Verdict::Abandoned => ABANDONED,
        };
        let settled = self.word().compare_exchange(OPEN, word, Ordering::AcqRel, Ordering::Acquire);
        Some(settled.map_or_else(read, |_| verdict))
    }

    fn peek(&self) -> Verdict {
        read(self.word().load(Ordering::Acquire))
    }
}

/// Whatever else a word says begins nothing.
fn read(word: u32) -> Verdict {
    match word {
        OPEN => Verdict::Open,
        COMMIT => Verdict::Commit,
        _ => Verdict::Abandoned,
    }
}

impl Drop for SharedRegister {
    fn drop(&mut self) {
        // SAFETY: the address and length are what mmap was given; nothing borrowed from self outlives it.
        unsafe { libc::munmap(self.0.as_ptr().cast(), LEN) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_settled_once_and_all_who_have_it_read_the_same() {
        let (leader, fd) = SharedRegister::create().unwrap();
        let rank = SharedRegister::attach(fd.try_clone().unwrap()).unwrap();
        assert_eq!((leader.peek(), rank.settle(Verdict::Open)), (Verdict::Open, Some(Verdict::Open)));
        assert_eq!(leader.settle(Verdict::Commit), Some(Verdict::Commit));
        drop(leader);
        assert_eq!(rank.settle(Verdict::Abandoned), Some(Verdict::Commit));
        assert_eq!(SharedRegister::attach(fd).unwrap().peek(), Verdict::Commit);
    }

    #[test]
    fn memory_that_could_be_taken_away_is_refused() {
        let file = tempfile();
        assert!(SharedRegister::attach(file).is_err());
        // SAFETY: a NUL-terminated name and known flags.
        let raw = unsafe { libc::memfd_create(c"bare".as_ptr(), libc::MFD_ALLOW_SEALING) };
        // SAFETY: memfd_create just gave us this descriptor.
        let bare = unsafe { OwnedFd::from_raw_fd(raw) };
        // SAFETY: fd is ours.
        assert_eq!(unsafe { libc::ftruncate(raw, LEN as libc::off_t) }, 0);
        assert!(SharedRegister::attach(bare).is_err());
    }

    fn tempfile() -> OwnedFd {
        std::fs::File::open("/proc/self/exe").unwrap().into()
    }
}
