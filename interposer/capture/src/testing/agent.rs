//! A stand-in for the agent.

use std::{
    io::Read,
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::Path,
};

use wire::control::{ToAgent, decode_next};

/// In place of an agent: it takes ranks in and reads what they say.
pub struct Agent(UnixListener);

impl Agent {
    pub fn at(path: &Path) -> Self {
        Self(UnixListener::bind(path).unwrap())
    }

    /// The next rank, with what it has said so far and the memory that came first.
    pub fn accept(&self) -> (UnixStream, Vec<ToAgent>, Option<OwnedFd>) {
        let (mut stream, _) = self.0.accept().unwrap();
        let (mut bytes, fd) = first_descriptor(&stream);
        let messages = heard_after(&mut stream, &mut bytes);
        (stream, messages, fd)
    }
}

/// What has come so far.
pub fn heard(stream: &mut UnixStream) -> Vec<ToAgent> {
    heard_after(stream, &mut Vec::new())
}

fn heard_after(stream: &mut UnixStream, bytes: &mut Vec<u8>) -> Vec<ToAgent> {
    stream.set_nonblocking(true).unwrap();
    let mut out = Vec::new();
    // An error is "nothing more now".
    let _ = stream.read_to_end(bytes);
    while let Some(message) = decode_next(bytes).unwrap() {
        out.push(message);
    }
    out
}

/// The first bytes of a connection, and the descriptor on them.
fn first_descriptor(stream: &UnixStream) -> (Vec<u8>, Option<OwnedFd>) {
    #[repr(align(8))]
    struct Ancillary([u8; 64]);
    let (mut ancillary, mut bytes) = (Ancillary([0; 64]), vec![0; 16]);
    let mut slice = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    // SAFETY: msghdr is plain data; every pointer in it outlives the call, and the lengths are theirs.
    unsafe {
        let mut message: libc::msghdr = std::mem::zeroed();
        (message.msg_iov, message.msg_iovlen) = (&raw mut slice, 1);
        (message.msg_control, message.msg_controllen) = (ancillary.0.as_mut_ptr().cast(), ancillary.0.len());
        let n = libc::recvmsg(stream.as_raw_fd(), &raw mut message, 0);
        bytes.truncate(usize::try_from(n).unwrap());
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        let fd = (!header.is_null()).then(|| libc::CMSG_DATA(header).cast::<i32>().read_unaligned());
        (bytes, fd.map(|fd| OwnedFd::from_raw_fd(fd)))
    }
}
