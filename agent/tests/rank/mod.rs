//! A rank without torch, and an agent to attach to.
#![allow(dead_code, reason = "each test crate uses its part")]

use std::{
    fs,
    io::{BufRead, BufReader, IoSlice, Read, Write},
    net::TcpStream,
    os::{fd::AsRawFd, unix::net::UnixStream},
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, Output, Stdio},
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use serde_json::Value;
use wire::{
    control::{self, CONTROL_VERSION, FromAgent, Hello, JobSigns, ToAgent},
    dtype::DType,
    env::OnFull,
    record::{Axis, Placement, RecordMeta},
    slab::{Mapping, SlabWriter},
};

/// A bound for hangs; nothing is measured with it.
pub const HANG: Duration = Duration::from_secs(60);

/// Polls until `condition` holds.
#[track_caller]
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < HANG, "{what} never came");
        std::thread::sleep(Duration::from_millis(10));
    }
}

pub fn flexmodel(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_flexmodel")).args(arguments).output().unwrap()
}

/// `flexmodel verify` finds nothing.
#[track_caller]
pub fn verify(run: &Path) {
    let done = flexmodel(&["verify", run.to_str().unwrap()]);
    assert!(
        done.status.success(),
        "{}{}",
        String::from_utf8_lossy(&done.stdout),
        String::from_utf8_lossy(&done.stderr)
    );
}

/// A running agent, killed when dropped.
pub struct Agent {
    pub child: Child,
    pub out: PathBuf,
    pub socket: PathBuf,
    /// The dashboard's address, with the token.
    pub page: String,
    stdout: BufReader<ChildStdout>,
}

impl Agent {
    /// In `folder`, ready for ranks.
    pub fn start(folder: &Path) -> Self {
        Self::with(folder, &[])
    }

    pub fn with(folder: &Path, more: &[&str]) -> Self {
        Self::prepared(folder, more, |_| {})
    }

    /// `prepare` has the last word on how it is started.
    pub fn prepared(folder: &Path, more: &[&str], prepare: impl FnOnce(&mut Command)) -> Self {
        let (out, socket) = (folder.join("run"), folder.join("agent.sock"));
        let mut command = Command::new(env!("CARGO_BIN_EXE_flexmodel"));
        command.arg("agent").arg("--socket").arg(&socket).arg("--out").arg(&out).args(more);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        prepare(&mut command);
        let mut child = command.spawn().unwrap();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        stdout.read_line(&mut line).unwrap();
        assert!(line.contains("http://127.0.0.1:") && line.contains("?token="), "not ready: {line}");
        let page = line.split(' ').next_back().unwrap_or("").trim().to_owned();
        Self { child, out, socket, page, stdout }
    }

    /// `kill -9`.
    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// SIGTERM; returns its stderr.
    pub fn finish(mut self) -> String {
        // SAFETY: a signal to our own child, which is not reaped yet.
        unsafe { libc::kill(self.child.id() as i32, libc::SIGTERM) };
        let status = self.child.wait().unwrap();
        let mut text = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut text).unwrap();
        assert!(status.success(), "{status}\n{text}");
        text
    }

    pub fn parts(&self) -> usize {
        parts(&self.out).len()
    }

    /// The page's host with its port, and the token.
    pub fn page(&self) -> (&str, &str) {
        let (base, token) = self.page.split_once("/?token=").unwrap();
        (base.strip_prefix("http://").unwrap(), token)
    }

    /// What the page answers to who has the token: status and body.
    pub fn ask(&self, path: &str) -> (u16, String) {
        let (host, token) = self.page();
        let mut stream = TcpStream::connect(host).unwrap();
        stream.set_read_timeout(Some(HANG)).unwrap();
        let head = format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {token}\r\n");
        stream.write_all(format!("{head}Connection: close\r\n\r\n").as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
    }

    /// A field of its memory in bytes, such as `VmRSS`.
    pub fn memory(&self, field: &str) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':')).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// `run.json`.
pub fn info(run: &Path) -> Value {
    serde_json::from_slice(&fs::read(run.join("run.json")).unwrap()).unwrap()
}

pub fn total(run: &Path, name: &str) -> u64 {
    info(run)["totals"][name].as_u64().unwrap()
}

/// The manifest's lines of one kind, without a torn last one.
pub fn lines(run: &Path, kind: &str) -> Vec<Value> {
    let text = fs::read(run.join("manifest.jsonl")).unwrap_or_default();
    text.split_inclusive(|&b| b == b'\n')
        .filter(|line| line.ends_with(b"\n"))
        .map(|line| serde_json::from_slice::<Value>(line).unwrap()["rec"].take())
        .filter(|rec| rec["t"] == kind)
        .collect()
}

pub fn parts(run: &Path) -> Vec<Value> {
    lines(run, "part")
}

/// The bytes of a part, from whichever file they are in.
pub fn bytes_at(run: &Path, part: &Value) -> Vec<u8> {
    let at = &part["at"];
    let stem = run.join(at["shard"].as_str().unwrap());
    let file = fs::read(stem.with_extension("safetensors")).or_else(|_| fs::read(stem.with_extension("open"))).unwrap();
    let (offset, len) = (at["offset"].as_u64().unwrap() as usize, at["len"].as_u64().unwrap() as usize);
    file[offset..offset + len].to_vec()
}

/// A float32 forward output `[rows, 16]`.
pub fn meta(module: &str, step: u64, rows: u64) -> RecordMeta {
    RecordMeta {
        class: "MLP".into(),
        step,
        time_ns: step + 1,
        ..RecordMeta::output(module, DType::Float32, vec![rows, 16])
    }
}

/// Bytes that tell where they come from.
pub fn bytes_of(meta: &RecordMeta) -> Vec<u8> {
    let seed = meta.step as u8 ^ meta.rank as u8;
    (0..meta.payload_len().unwrap()).map(|n| (n as u8).wrapping_mul(13).wrapping_add(seed)).collect()
}

/// A rank and its slab.
pub struct Rank {
    pub rank: u32,
    pub world: u32,
    pub pid: u32,
    /// Number of its process group.
    pub group: u64,
    pub slab: SlabWriter,
    pub stream: Option<UnixStream>,
}

impl Rank {
    pub fn new(rank: u32, world: u32, slab: u64) -> Self {
        // Ranks are told apart by their process; here they share one.
        Self {
            rank,
            world,
            pid: 1_000_000 + rank,
            group: u64::from(world > 1),
            slab: SlabWriter::create(slab, rank).unwrap(),
            stream: None,
        }
    }

    /// Attached to `agent`.
    pub fn attached(agent: &Agent, rank: u32, world: u32, slab: u64) -> Self {
        let mut made = Self::new(rank, world, slab);
        assert_eq!(made.attach(&agent.socket), FromAgent::Welcome);
        made
    }

    pub fn hello(&self) -> Hello {
        Hello {
            version: CONTROL_VERSION,
            rank: self.rank,
            world: self.world,
            pid: self.pid,
            node: "here".into(),
            torch: "2.11.0".into(),
            python: "3.11.7".into(),
            command: vec!["train.py".into()],
            hooks: "layers.*.mlp".into(),
            on_full: OnFull::Wait,
            wrapper: "DDP".into(),
            job: Box::new(JobSigns { group: self.group, launch: "elastic test".into(), ..JobSigns::default() }),
        }
    }

    /// Connects, anew if need be, with the slab it has.
    pub fn attach(&mut self, socket: &Path) -> FromAgent {
        let hello = self.hello();
        self.attach_as(socket, hello)
    }

    pub fn attach_as(&mut self, socket: &Path, hello: Hello) -> FromAgent {
        let stream = UnixStream::connect(socket).unwrap();
        send_with_fd(&stream, &control::encode(&ToAgent::Hello(hello)).unwrap(), self.slab.mapping());
        let answer = answer(&stream);
        self.stream = Some(stream);
        answer
    }

    pub fn say(&mut self, message: &ToAgent) {
        self.stream.as_mut().unwrap().write_all(&control::encode(message).unwrap()).unwrap();
    }

    /// Ships a whole tensor or piece of the batch, waiting for room.
    pub fn ship(&mut self, module: &str, step: u64, rows: u64) {
        let mut record = meta(module, step, rows);
        record.rank = self.rank;
        record.dp_size = self.world;
        if self.world > 1 {
            let place = Placement::Shard { dim: 0 };
            record.axes =
                vec![Axis { name: "dp".into(), index: self.rank, size: self.world, place, input_digest: None }];
        }
        self.ship_record(&record, &bytes_of(&record));
    }

    pub fn ship_record(&mut self, record: &RecordMeta, bytes: &[u8]) {
        let mut encoded = Vec::new();
        record.encode(&mut encoded);
        let number = self.slab.begin_record();
        let mut at = 0;
        loop {
            let end = bytes.len().min(at + self.slab.max_piece() as usize);
            let head: &[u8] = if at == 0 { &encoded } else { &[] };
            let mut slot = None;
            wait_until("room in the slab", || {
                slot = self.slab.try_reserve(number, head, at as u64, (end - at) as u64, bytes.len() as u64);
                slot.is_some()
            });
            let slot = slot.unwrap();
            // SAFETY: the reservation owns end - at bytes.
            unsafe { std::ptr::copy_nonoverlapping(bytes[at..].as_ptr(), slot.payload(), end - at) };
            slot.commit();
            at = end;
            if at == bytes.len() {
                return;
            }
        }
    }

    /// Counts tensors as lost, as a tap does that found no room.
    pub fn count_dropped(&self, count: u64) {
        self.slab.mapping().header().dropped.fetch_add(count, Ordering::Relaxed);
    }

    /// Everything written is read.
    pub fn drained(&self) {
        wait_until("an empty slab", || self.slab.in_flight() == 0);
    }
}

/// The agent's next word that is no question: these ranks do not answer.
pub fn answer(stream: &UnixStream) -> FromAgent {
    stream.set_read_timeout(Some(HANG)).unwrap();
    let mut message = vec![0; 4];
    loop {
        // No byte of the next one, which the agent may have sent with it.
        (&mut &*stream).read_exact(&mut message[..4]).unwrap();
        message.resize(control::announced(&message).unwrap(), 0);
        (&mut &*stream).read_exact(&mut message[4..]).unwrap();
        let word = control::decode_next(&mut message).unwrap().unwrap();
        if !matches!(word, FromAgent::Ask { .. }) {
            return word;
        }
        message.resize(4, 0);
    }
}

/// The agent's next word that is `wanted`; what came after it is left in `buffer`.
pub fn hear(mut stream: &UnixStream, buffer: &mut Vec<u8>, wanted: impl Fn(&FromAgent) -> bool) -> FromAgent {
    stream.set_read_timeout(Some(HANG)).unwrap();
    loop {
        match control::decode_next(buffer).unwrap() {
            Some(message) if wanted(&message) => return message,
            Some(_) => continue,
            None => {}
        }
        let mut chunk = [0; 4096];
        let n = stream.read(&mut chunk).unwrap();
        assert!(n > 0, "the agent closed the connection without a word");
        buffer.extend_from_slice(&chunk[..n]);
    }
}

/// Sends `bytes` with the slab's descriptor on the first of them.
pub fn send_with_fd(mut stream: &UnixStream, bytes: &[u8], map: &Mapping) {
    #[repr(align(8))]
    struct Ancillary([u8; 24]);
    let mut ancillary = Ancillary([0; 24]);
    let slices = [IoSlice::new(bytes)];
    // SAFETY: msghdr is plain data; every pointer in it outlives the call; the buffer has room for one descriptor.
    let sent = unsafe {
        let mut message: libc::msghdr = std::mem::zeroed();
        (message.msg_iov, message.msg_iovlen) = (slices.as_ptr().cast_mut().cast(), 1);
        message.msg_control = ancillary.0.as_mut_ptr().cast();
        message.msg_controllen = libc::CMSG_SPACE(4) as usize;
        let header = libc::CMSG_FIRSTHDR(&message);
        (*header).cmsg_level = libc::SOL_SOCKET;
        (*header).cmsg_type = libc::SCM_RIGHTS;
        (*header).cmsg_len = libc::CMSG_LEN(4) as usize;
        libc::CMSG_DATA(header).cast::<i32>().write_unaligned(map.fd().unwrap().as_raw_fd());
        libc::sendmsg(stream.as_raw_fd(), &message, 0)
    };
    stream.write_all(&bytes[usize::try_from(sent).unwrap()..]).unwrap();
}
