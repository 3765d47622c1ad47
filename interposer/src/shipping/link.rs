//! The socket to the agent: attaches late, notices a death, attaches again.

use std::{
    io::{IoSlice, Read},
    os::fd::{AsRawFd, BorrowedFd},
    os::unix::net::UnixStream,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use wire::{
    control::{self, CONTROL_VERSION, FromAgent, Hello, ToAgent},
    env::{self, OnFull},
    slab::Mapping,
    tap_abi::Rank,
};

use crate::log;

/// How often an absent agent is looked for, and a present one looked at.
const LOOK: Duration = Duration::from_millis(500);
/// Longest time a message to a stopped agent may take.
const SEND: Duration = Duration::from_millis(500);
/// Notices that are kept for an agent that comes later.
const MAX_KEPT: usize = 200;

/// The link, whether or not an agent is at its end.
pub struct Link {
    socket: PathBuf,
    hello: Hello,
    stream: Option<UnixStream>,
    /// What a new agent has to be told again.
    kept: Vec<ToAgent>,
    looked: Option<Instant>,
    inbox: Vec<u8>,
    /// The loss of an agent is told once.
    told: bool,
    /// This agent refused us: do not ask again.
    refused: bool,
}

impl Link {
    /// A link that has not looked for its agent yet.
    pub fn new(socket: &str, hooks: &str, on_full: OnFull) -> Self {
        let hello = Hello {
            version: CONTROL_VERSION,
            rank: 0,
            world: 1,
            pid: 0,
            node: node(),
            torch: String::new(),
            python: String::new(),
            command: command(),
            hooks: hooks.to_owned(),
            on_full,
            wrapper: String::new(),
        };
        Self {
            socket: socket.into(),
            hello,
            stream: None,
            kept: Vec::new(),
            looked: None,
            inbox: Vec::new(),
            told: false,
            refused: false,
        }
    }

    /// Fills in the rank; to be called before the first tensor.
    pub fn describe(&mut self, rank: Rank, torch: &str, python: &str, wrapper: &str) {
        let hello = &mut self.hello;
        (hello.rank, hello.world, hello.pid) = (rank.rank, rank.world, std::process::id());
        hello.torch = torch.to_owned();
        hello.python = python.to_owned();
        if !wrapper.is_empty() {
            hello.wrapper = wrapper.to_owned();
        }
    }

    /// This process's rank.
    pub fn rank(&self) -> u32 {
        self.hello.rank
    }

    /// Sends a message, now or when an agent is there.
    pub fn say(&mut self, message: ToAgent) {
        self.send(&message);
        if self.kept.len() < MAX_KEPT {
            self.kept.push(message);
        }
    }

    /// Looks, not more often than [`LOOK`], whether the agent is there.
    pub fn tend(&mut self, map: &Arc<Mapping>) {
        if self.looked.is_some_and(|t| t.elapsed() < LOOK) {
            return;
        }
        self.alive(map);
        self.looked = Some(Instant::now());
    }

    /// Whether an agent is there; attaches to one that has come.
    pub fn alive(&mut self, map: &Arc<Mapping>) -> bool {
        if self.stream.is_some() && self.listen() {
            return true;
        }
        if self.refused || self.looked.is_some_and(|t| t.elapsed() < LOOK) {
            return false;
        }
        self.looked = Some(Instant::now());
        self.attach(map)
    }

    fn attach(&mut self, map: &Arc<Mapping>) -> bool {
        let Ok(stream) = UnixStream::connect(&self.socket) else {
            if !self.told {
                self.told = true;
                log::line(&format!(
                    "no agent at {}: captures wait in memory, then are lost, until one is there",
                    self.socket.display()
                ));
            }
            return false;
        };
        let ready = stream.set_write_timeout(Some(SEND)).is_ok();
        let Ok(bytes) = control::encode(&ToAgent::Hello(self.hello.clone())) else { return false };
        if !ready || !send_with_fd(&stream, &bytes, map.fd()) {
            return false;
        }
        self.stream = Some(stream);
        self.inbox.clear();
        for message in std::mem::take(&mut self.kept) {
            self.send(&message);
            self.kept.push(message);
        }
        self.stream.is_some()
    }

    /// Reads what the agent said, without waiting. Whether it is still there.
    fn listen(&mut self) -> bool {
        let Some(stream) = self.stream.as_mut() else { return false };
        let mut chunk = [0; 512];
        loop {
            // SAFETY: the buffer is valid for its length; MSG_DONTWAIT never blocks.
            let n =
                unsafe { libc::recv(stream.as_raw_fd(), chunk.as_mut_ptr().cast(), chunk.len(), libc::MSG_DONTWAIT) };
            match n {
                0 => return self.lost(),
                n if n > 0 => self.inbox.extend(chunk.iter().take(n as usize)),
                _ => match std::io::Error::last_os_error().kind() {
                    std::io::ErrorKind::WouldBlock => break,
                    std::io::ErrorKind::Interrupted => continue,
                    _ => return self.lost(),
                },
            }
        }
        while let Ok(Some(message)) = control::decode_next::<FromAgent>(&mut self.inbox) {
            if let FromAgent::Refused(why) = message {
                log::line(&format!("the agent refused this rank: {why}"));
                self.refused = true;
                self.stream = None;
                return false;
            }
        }
        true
    }

    fn lost(&mut self) -> bool {
        self.stream = None;
        if !self.told {
            self.told = true;
            log::line("the agent is gone: captures wait in memory, then are lost, until it is back");
        }
        false
    }

    fn send(&mut self, message: &ToAgent) {
        let Some(stream) = self.stream.as_ref() else { return };
        let Ok(bytes) = control::encode(message) else { return };
        // A message that was sent in part cannot be repaired: the agent has to be attached to anew.
        if !send_all(stream, &bytes) {
            self.lost();
        }
    }
}

/// `flexmodel`'s name for this node.
fn node() -> String {
    if let Some(name) = std::env::var(env::NODE).ok().filter(|n| !n.is_empty()) {
        return name;
    }
    let mut buffer = [0u8; 256];
    // SAFETY: the buffer is valid for its length, and keeps its last NUL.
    unsafe { libc::gethostname(buffer.as_mut_ptr().cast(), buffer.len() - 1) };
    buffer.iter().take_while(|&&b| b != 0).map(|&b| char::from(b)).collect()
}

fn command() -> Vec<String> {
    let mut bytes = Vec::new();
    if let Ok(file) = std::fs::File::open("/proc/self/cmdline") {
        let _ = file.take(1 << 16).read_to_end(&mut bytes);
    }
    bytes.split(|&b| b == 0).filter(|w| !w.is_empty()).map(|w| String::from_utf8_lossy(w).into_owned()).collect()
}

/// Sends `bytes` with a descriptor on the first of them (SCM_RIGHTS).
fn send_with_fd(stream: &UnixStream, bytes: &[u8], fd: BorrowedFd<'_>) -> bool {
    const SPACE: usize = 24;
    #[repr(align(8))]
    struct Ancillary([u8; SPACE]);
    let mut ancillary = Ancillary([0; SPACE]);
    let slices = [IoSlice::new(bytes)];
    // SAFETY: msghdr is plain data; every pointer in it outlives the call; the ancillary buffer is aligned and has
    // room for one header and one descriptor (CMSG_SPACE(4) is 24 on x86-64).
    let sent = unsafe {
        let mut message: libc::msghdr = std::mem::zeroed();
        message.msg_iov = slices.as_ptr().cast_mut().cast();
        message.msg_iovlen = 1;
        message.msg_control = ancillary.0.as_mut_ptr().cast();
        message.msg_controllen = libc::CMSG_SPACE(size_of::<i32>() as u32) as usize;
        let header = libc::CMSG_FIRSTHDR(&message);
        if header.is_null() || message.msg_controllen > SPACE {
            return false;
        }
        (*header).cmsg_level = libc::SOL_SOCKET;
        (*header).cmsg_type = libc::SCM_RIGHTS;
        (*header).cmsg_len = libc::CMSG_LEN(size_of::<i32>() as u32) as usize;
        libc::CMSG_DATA(header).cast::<i32>().write_unaligned(fd.as_raw_fd());
        libc::sendmsg(stream.as_raw_fd(), &message, libc::MSG_NOSIGNAL)
    };
    let Ok(sent) = usize::try_from(sent) else { return false };
    bytes.get(sent..).is_some_and(|rest| send_all(stream, rest))
}

/// Sends all of `bytes`, each part within the stream's write timeout, and never raises SIGPIPE in the job.
fn send_all(stream: &UnixStream, mut bytes: &[u8]) -> bool {
    while !bytes.is_empty() {
        // SAFETY: the buffer is valid for its length.
        let n = unsafe { libc::send(stream.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), libc::MSG_NOSIGNAL) };
        match usize::try_from(n) {
            Ok(n) => bytes = bytes.get(n..).unwrap_or_default(),
            Err(_) if std::io::Error::last_os_error().kind() == std::io::ErrorKind::Interrupted => {}
            Err(_) => return false,
        }
    }
    true
}
