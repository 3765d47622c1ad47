//! A unix stream socket on which nothing ever waits: the agent at its other end may be stopped. The job may have closed
//! it, so it is a [`Descriptor`]; and whoever listens may be another user, so nothing is sent before that was looked at.

use std::{
    collections::VecDeque,
    ffi::OsStr,
    io,
    os::{
        fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
    time::Duration,
};

use wire::{control::MAX_QUESTIONS, descriptor::Descriptor, passing};

/// Bytes asked for at a time.
const CHUNK: usize = 4096;

/// Why there is no connection.
#[derive(Debug)]
pub enum NoConnection {
    /// Nobody listens, or takes anybody in at the moment.
    Absent,
    /// This user listens, who is not the job's.
    Foreign(u32),
    /// The system refused this call.
    System(&'static str, io::Error),
}

/// Connects at once or not at all, and only to a process of our own user: whoever listens gets the job's tensors.
pub fn connect(path: &Path) -> Result<Descriptor, NoConnection> {
    // SAFETY: geteuid has no effects and cannot fail.
    connect_as(path, unsafe { libc::geteuid() })
}

/// As [`connect`], for a process of this user.
pub(super) fn connect_as(path: &Path, own: u32) -> Result<Descriptor, NoConnection> {
    let refused = |call| move |error| NoConnection::System(call, error);
    let address = address(path).map_err(refused("its path"))?;
    // SAFETY: known constants.
    let raw = unsafe { libc::socket(libc::AF_UNIX, libc::SOCK_STREAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC, 0) };
    if raw < 0 {
        return Err(refused("socket")(io::Error::last_os_error()));
    }
    // SAFETY: socket just gave us this descriptor.
    let socket = Descriptor::keep(unsafe { OwnedFd::from_raw_fd(raw) }).map_err(refused("fstat"))?;
    let stream = socket.get().map_err(refused("socket"))?;
    // SAFETY: the address is initialised and of the length given.
    let done = unsafe {
        libc::connect(stream.as_raw_fd(), (&raw const address).cast(), size_of_val(&address) as libc::socklen_t)
    };
    if done != 0 {
        let error = io::Error::last_os_error();
        return Err(match error.raw_os_error() {
            // A listener that takes nobody in, because its queue is full, is as good as none.
            Some(libc::ENOENT | libc::ENOTDIR | libc::ECONNREFUSED | libc::EAGAIN) => NoConnection::Absent,
            _ => refused("connect")(error),
        });
    }
    match listener(stream).map_err(refused("getsockopt"))? {
        user if user == own => Ok(socket),
        user => Err(NoConnection::Foreign(user)),
    }
}

/// The user who listens, as it was when that began.
fn listener(socket: BorrowedFd<'_>) -> io::Result<u32> {
    let mut peer = libc::ucred { pid: 0, uid: u32::MAX, gid: u32::MAX };
    let mut len = size_of_val(&peer) as libc::socklen_t;
    // SAFETY: the buffer is valid for the length given.
    let done = unsafe {
        let peer = (&raw mut peer).cast();
        libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_PEERCRED, peer, &mut len)
    };
    if done == 0 { Ok(peer.uid) } else { Err(io::Error::last_os_error()) }
}

fn address(path: &Path) -> io::Result<libc::sockaddr_un> {
    let path: &OsStr = path.as_ref();
    // SAFETY: sockaddr_un is plain data.
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    address.sun_family = libc::AF_UNIX as libc::sa_family_t;
    // The last byte stays NUL.
    if path.len() >= address.sun_path.len() {
        return Err(io::ErrorKind::InvalidFilename.into());
    }
    for (to, from) in address.sun_path.iter_mut().zip(path.as_bytes()) {
        *to = *from as libc::c_char;
    }
    Ok(address)
}

/// Sends what goes without waiting, with a descriptor on the first byte where one is given.
pub fn send(stream: &Descriptor, bytes: &[u8], fd: Option<BorrowedFd<'_>>) -> io::Result<usize> {
    passing::send(stream.get()?, bytes, fd)
}

/// Appends what has come to `inbox`, without waiting, and a descriptor to `fds`; 0 at the end of the connection.
pub fn receive(stream: &Descriptor, inbox: &mut Vec<u8>, fds: &mut VecDeque<OwnedFd>) -> io::Result<usize> {
    let mut fd = None;
    let n = passing::receive(stream.get()?, inbox, CHUNK, &mut fd)?;
    // Each is for a question, and more than these are not open.
    fds.extend(fd.filter(|_| fds.len() < MAX_QUESTIONS));
    Ok(n)
}

/// Waits until something can be sent, or the connection is gone, or `limit` passes.
pub fn wait_to_send(stream: &Descriptor, limit: Duration) {
    let Ok(stream) = stream.get() else { return };
    let mut poll = libc::pollfd { fd: stream.as_raw_fd(), events: libc::POLLOUT, revents: 0 };
    // SAFETY: one valid pollfd.
    unsafe { libc::poll(&mut poll, 1, i32::try_from(limit.as_millis()).unwrap_or(i32::MAX).max(1)) };
}

/// Whether an error means "not now" and not "gone".
pub fn is_later(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::{UnixListener, UnixStream};

    use super::*;
    use crate::testing::Folder;

    #[test]
    fn a_path_too_long_is_an_error() {
        assert!(connect(Path::new(&"x".repeat(108))).is_err());
    }

    #[test]
    fn another_users_listener_is_named_by_its_number_and_hears_nothing() {
        let folder = Folder::new();
        let listener = UnixListener::bind(folder.path("s")).unwrap();
        // SAFETY: geteuid has no effects.
        let own = unsafe { libc::geteuid() };
        let why = connect_as(&folder.path("s"), own + 1).unwrap_err();
        assert!(matches!(why, NoConnection::Foreign(user) if user == own), "{why:?}");
        let (mut peer, _) = listener.accept().unwrap();
        assert_eq!(std::io::Read::read(&mut peer, &mut [0]).unwrap(), 0, "something was sent");
        assert!(connect_as(&folder.path("s"), own).is_ok());
        assert!(matches!(connect(&folder.path("none")), Err(NoConnection::Absent)));
    }

    #[test]
    fn nobody_who_reads_is_later_and_nobody_at_all_is_an_end() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let ours = Descriptor::keep(ours.into()).unwrap();
        let mut sent = 0;
        let error = loop {
            match send(&ours, &[0; 4096], None) {
                Ok(n) => sent += n,
                Err(e) => break e,
            }
        };
        assert!(sent > 0 && is_later(&error), "{error}");
        assert!(is_later(&receive(&ours, &mut Vec::new(), &mut VecDeque::new()).unwrap_err()));
        drop(theirs);
        assert!(!is_later(&send(&ours, &[0], None).unwrap_err()));
    }
}
