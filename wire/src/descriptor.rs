//! A descriptor in a process that is not ours.
//!
//! A job may close every descriptor that it does not know, as daemons do, and open files of its own under their
//! numbers. What is then done to a number that we remember would be done to the job's file. So ours lie at high
//! numbers, where files are not opened by themselves, and before each use, also before it is closed, a descriptor is
//! compared with the file that it was: another file is the job's, and forgotten. Between the comparison and the use
//! another thread of the job may still close it and open something else; no system call does both at once.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd},
};

/// Ours begin here, or at 7/8 of what the process may have: the kernel's table grows with the largest number.
const HIGH: RawFd = 4096;

/// A descriptor of ours, as long as the job leaves it to us.
#[derive(Debug)]
pub struct Descriptor {
    number: RawFd,
    file: File,
}

/// Tells files apart, sockets and memory included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct File {
    device: u64,
    inode: u64,
}

impl Descriptor {
    /// Takes a descriptor to a high number, where there is a free one, and remembers which file it is.
    pub fn keep(fd: OwnedFd) -> io::Result<Self> {
        let fd = to_high_number(fd);
        let file = File::of(fd.as_raw_fd())?;
        Ok(Self { number: fd.into_raw_fd(), file })
    }

    /// The descriptor, if it still is the file that it was; else an error that [`is_closed`] knows.
    pub fn get(&self) -> io::Result<BorrowedFd<'_>> {
        if File::of(self.number).is_ok_and(|file| file == self.file) {
            // SAFETY: it is open, and ours: we opened this file and gave its number to nobody.
            Ok(unsafe { BorrowedFd::borrow_raw(self.number) })
        } else {
            Err(io::Error::new(io::ErrorKind::NotConnected, Closed))
        }
    }
}

/// The error of a descriptor that the job has closed.
#[derive(Debug, thiserror::Error)]
#[error("the job has closed a descriptor of ours")]
struct Closed;

/// Whether an error comes of a descriptor that the job has closed.
pub fn is_closed(error: &io::Error) -> bool {
    error.get_ref().is_some_and(|inner| inner.is::<Closed>())
}

impl Drop for Descriptor {
    fn drop(&mut self) {
        if self.get().is_ok() {
            // SAFETY: as in `get`; nothing borrowed from self outlives it.
            drop(unsafe { OwnedFd::from_raw_fd(self.number) });
        }
    }
}

impl File {
    fn of(number: RawFd) -> io::Result<Self> {
        // SAFETY: stat is plain data.
        let mut stat: libc::stat = unsafe { std::mem::zeroed() };
        // SAFETY: the buffer is valid for the call; a closed descriptor answers -1.
        match unsafe { libc::fstat(number, &mut stat) } {
            0 => Ok(Self { device: stat.st_dev, inode: stat.st_ino }),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

/// The same file under a high number; as it is where that is refused.
fn to_high_number(fd: OwnedFd) -> OwnedFd {
    // SAFETY: rlimit is plain data, and valid for the call.
    let most = unsafe {
        let mut limit: libc::rlimit = std::mem::zeroed();
        libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit);
        limit.rlim_cur
    };
    let from = RawFd::try_from(most - most / 8).unwrap_or(HIGH).min(HIGH);
    // SAFETY: fd is open; the flag makes the new one close on exec.
    match unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, from) } {
        -1 => fd,
        // SAFETY: fcntl just gave us this descriptor.
        high => unsafe { OwnedFd::from_raw_fd(high) },
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        os::{fd::AsFd, unix::net::UnixStream},
    };

    use super::*;

    /// What a job does: another file under that number. The original is gone.
    fn take_over(number: RawFd, by: impl AsFd) {
        // SAFETY: the test owns both descriptors.
        assert_eq!(unsafe { libc::dup2(by.as_fd().as_raw_fd(), number) }, number);
    }

    #[test]
    fn it_is_at_a_high_number_and_closes_with_its_holder() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let kept = Descriptor::keep(ours.into()).unwrap();
        assert!(kept.number >= 64 && kept.get().is_ok());
        drop(kept);
        assert_eq!(theirs.read(&mut [0]).unwrap(), 0, "still open somewhere");
    }

    #[test]
    fn what_the_job_closed_is_no_descriptor_of_ours_and_its_next_file_is_left_alone() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let kept = Descriptor::keep(ours.into()).unwrap();
        let (job, mut peer) = UnixStream::pair().unwrap();
        let number = kept.number;
        take_over(number, &job);
        assert!(is_closed(&kept.get().unwrap_err()));
        drop((kept, job));
        // SAFETY: the number is the job's socket, which nobody has closed.
        let mut job = unsafe { UnixStream::from_raw_fd(number) };
        job.write_all(b"x").unwrap();
        assert_eq!(peer.read(&mut [0; 2]).unwrap(), 1);
    }

    #[test]
    fn a_closed_number_is_lost_and_is_not_closed_again() {
        let kept = Descriptor::keep(std::fs::File::open("/").unwrap().into()).unwrap();
        // SAFETY: the test plays the job, which closes what it does not know.
        unsafe { libc::close(kept.number) };
        assert!(kept.get().is_err());
    }
}
