//! Messages with descriptors on a unix socket (`SCM_RIGHTS`), without waiting, and never with SIGPIPE.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
};

/// Room for one header and the descriptors that a peer may send with a message.
#[repr(align(8))]
struct Ancillary([u8; 256]);

/// Sends what goes now, with a descriptor on its first byte where one is given. How many bytes.
///
/// # Errors
/// The system's: "would block" where nothing goes.
pub fn send(stream: BorrowedFd<'_>, bytes: &[u8], fd: Option<BorrowedFd<'_>>) -> io::Result<usize> {
    let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
    let Some(fd) = fd else {
        // A filter of system calls may forbid what carries descriptors, and let words pass.
        // SAFETY: the buffer is valid for its length.
        return count(unsafe { libc::send(stream.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), flags) });
    };
    let mut ancillary = Ancillary([0; 256]);
    let mut slice = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    // SAFETY: msghdr is plain data; every pointer in it outlives the call; the ancillary buffer is aligned and has room
    // for one header and one descriptor.
    count(unsafe {
        let mut message: libc::msghdr = std::mem::zeroed();
        (message.msg_iov, message.msg_iovlen) = (&raw mut slice, 1);
        message.msg_control = ancillary.0.as_mut_ptr().cast();
        message.msg_controllen = libc::CMSG_SPACE(size_of::<i32>() as u32) as usize;
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        if header.is_null() {
            return Err(io::ErrorKind::Unsupported.into());
        }
        (*header).cmsg_level = libc::SOL_SOCKET;
        (*header).cmsg_type = libc::SCM_RIGHTS;
        (*header).cmsg_len = libc::CMSG_LEN(size_of::<i32>() as u32) as usize;
        libc::CMSG_DATA(header).cast::<i32>().write_unaligned(fd.as_raw_fd());
        libc::sendmsg(stream.as_raw_fd(), &raw const message, flags)
    })
}

/// Reads what has come, at most `most` bytes of it: to the end of `bytes`, and a descriptor into `fd`, unless one is there
/// already. Further descriptors are closed. How many bytes; 0 at the end of the connection.
///
/// # Errors
/// The system's: "would block" where nothing has come.
pub fn receive(
    stream: BorrowedFd<'_>,
    bytes: &mut Vec<u8>,
    most: usize,
    fd: &mut Option<OwnedFd>,
) -> io::Result<usize> {
    let mut ancillary = Ancillary([0; 256]);
    let before = bytes.len();
    bytes.resize(before + most, 0);
    let room = bytes.get_mut(before..).unwrap_or_default();
    let mut slice = libc::iovec { iov_base: room.as_mut_ptr().cast(), iov_len: room.len() };
    // SAFETY: msghdr is plain data.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    (message.msg_iov, message.msg_iovlen) = (&raw mut slice, 1);
    (message.msg_control, message.msg_controllen) = (ancillary.0.as_mut_ptr().cast(), ancillary.0.len());
    // SAFETY: every pointer in the message outlives the call, and the lengths are theirs.
    let n = count(unsafe {
        libc::recvmsg(stream.as_raw_fd(), &raw mut message, libc::MSG_CMSG_CLOEXEC | libc::MSG_DONTWAIT)
    });
    bytes.truncate(before + n.as_ref().map_or(0, |n| *n));
    let n = n?;
    // SAFETY: recvmsg filled the ancillary buffer up to msg_controllen.
    let mut header = unsafe { libc::CMSG_FIRSTHDR(&raw const message) };
    while !header.is_null() {
        // SAFETY: CMSG_FIRSTHDR and CMSG_NXTHDR return headers that lie in the buffer.
        let (level, kind, len) = unsafe { ((*header).cmsg_level, (*header).cmsg_type, (*header).cmsg_len) };
        if level == libc::SOL_SOCKET && kind == libc::SCM_RIGHTS {
            // SAFETY: no memory is touched; the length of an empty header.
            let data = len.saturating_sub(unsafe { libc::CMSG_LEN(0) } as usize);
            for n in 0..data / size_of::<i32>() {
                // SAFETY: the kernel put that many descriptors there; each is ours now.
                let taken =
                    unsafe { OwnedFd::from_raw_fd(libc::CMSG_DATA(header).cast::<i32>().add(n).read_unaligned()) };
                if fd.is_none() {
                    *fd = Some(taken);
                }
            }
        }
        // SAFETY: as for CMSG_FIRSTHDR.
        header = unsafe { libc::CMSG_NXTHDR(&raw const message, header) };
    }
    Ok(n)
}

fn count(n: isize) -> io::Result<usize> {
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

#[cfg(test)]
mod tests {
    use std::os::{fd::AsFd, unix::net::UnixStream};

    use super::*;

    #[test]
    fn a_descriptor_comes_with_its_bytes_and_what_is_too_much_is_closed() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (kept, other) = UnixStream::pair().unwrap();
        assert_eq!(send(ours.as_fd(), b"ab", Some(other.as_fd())).unwrap(), 2);
        assert_eq!(send(ours.as_fd(), b"c", Some(other.as_fd())).unwrap(), 1);
        drop(other);
        let (mut bytes, mut fd) = (Vec::new(), None);
        assert_eq!(receive(theirs.as_fd(), &mut bytes, 64, &mut fd).unwrap(), 2);
        assert_eq!((bytes.as_slice(), fd.is_some()), (&b"ab"[..], true));
        assert_eq!(receive(theirs.as_fd(), &mut bytes, 64, &mut fd).unwrap(), 1);
        let (mut nothing, mut none) = (Vec::new(), None);
        assert_eq!(receive(theirs.as_fd(), &mut nothing, 64, &mut none).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        drop(fd);
        assert_eq!(receive(kept.as_fd(), &mut nothing, 64, &mut none).unwrap(), 0, "the second one was left open");
    }
}
