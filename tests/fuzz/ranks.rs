//! Ranks that attach to an agent in this process: an honest one, and others.

use std::{
    fs::File,
    io::{self, IoSlice, Write},
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
        unix::net::UnixStream,
    },
    path::Path,
    sync::{Arc, OnceLock, atomic::Ordering},
    time::{Duration, Instant},
};

use flexmodel_agent::server::{Server, attach, board::Board};
use flexmodel_run::{Options, Run, Store};
use libfuzzer_sys::arbitrary::{self, Arbitrary, Result, Unstructured};
use tokio::runtime::{Builder, Runtime};
use wire::{
    control::{Answer, CONTROL_VERSION, Hello, JobSigns, ModuleInfo, ToAgent, encode},
    dtype::DType,
    env::OnFull,
    record::{Axis, Placement, RecordMeta},
    revision::Since,
    slab::SlabWriter,
};

/// A bound for hangs.
const HANG: Duration = Duration::from_secs(30);
/// Smallest slab.
const SLAB: u64 = 64 << 10;
/// Module of the honest rank's records, which no other rank names.
const HONEST: &str = "honest";
/// Elements of each.
const ROWS: u64 = 100;

fn runtime() -> &'static Runtime {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    RUNTIME.get_or_init(|| Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("threads"))
}

/// An agent without a socket: connections are made in pairs.
pub struct Agent {
    server: Arc<Server>,
}

impl Agent {
    /// That writes its run in `folder`.
    pub fn start(folder: &Path) -> Self {
        let options = Options { shard_bytes: 4 << 20, notify: Box::new(|_| {}) };
        let (store, before, jobs) = Store::open(folder, options).expect("an empty folder");
        let board = Arc::new(Board::new(before));
        Self { server: Server::new(store, board, jobs, None, false).expect("a thread") }
    }

    /// A process that connects.
    pub fn connect(&self) -> UnixStream {
        let (ours, theirs) = UnixStream::pair().expect("a pair of sockets");
        theirs.set_nonblocking(true).expect("an option of a socket");
        // Nothing is read from the agent: its answers are short.
        ours.set_write_timeout(Some(HANG)).expect("an option of a socket");
        let _in_the_runtime = runtime().enter();
        let theirs = tokio::net::UnixStream::from_std(theirs).expect("a socket");
        let server = self.server.clone();
        runtime().spawn(async move {
            let arrival = server.arrival().await;
            attach::serve(server, theirs, arrival).await;
        });
        ours
    }

    /// Ends; `path` then holds the honest rank's `steps` records, and nothing has grown without bound.
    pub fn finish(self, path: &Path, steps: u64) {
        self.server.store.finish(false);
        let info = self.server.board.finish(&self.server.store, None);
        assert!(info.notices.len() <= wire::control::MAX_NOTICES, "{} notices", info.notices.len());
        assert!(info.models.len() <= wire::control::MAX_MODELS, "{} models", info.models.len());
        assert!(info.notices.iter().all(|n| n.len() <= wire::control::MAX_NOTICE));
        let run = Run::open(path).expect("a run");
        assert!(run.problems.is_empty(), "it does not read what it wrote: {:?}", run.problems);
        for step in 0..steps {
            let found = run.records.iter().find(|r| r.id.module == HONEST && r.id.step == step);
            let record = found.unwrap_or_else(|| panic!("the honest rank's step {step} is lost"));
            let whole = run.part(record, Honest::RANK).expect("its bytes");
            assert_eq!(whole.bytes.to_vec(), honest_bytes(step), "step {step}");
        }
    }
}

fn honest_bytes(step: u64) -> Vec<u8> {
    (0..ROWS).map(|n| (n + step) as u8).collect()
}

/// A rank that does nothing wrong.
pub struct Honest {
    slab: SlabWriter,
    stream: UnixStream,
    steps: u64,
}

impl Honest {
    /// Others may claim the same number.
    pub const RANK: u32 = 1;

    /// Attaches.
    pub fn attach(agent: &Agent) -> Self {
        let (slab, stream) = (SlabWriter::create(SLAB, Self::RANK).expect("memory"), agent.connect());
        send(&stream, &bytes(&ToAgent::Hello(hello(Self::RANK, 4, 1_000_000))), &[fd_of(&slab)]).expect("it is read");
        Self { slab, stream, steps: 0 }
    }

    /// Ships a record, and returns when it is read.
    pub fn ship(&mut self) {
        let meta =
            RecordMeta { step: self.steps, rank: Self::RANK, ..RecordMeta::output(HONEST, DType::UInt8, vec![ROWS]) };
        assert!(put(&mut self.slab, &meta, &honest_bytes(self.steps)), "an honest rank's slab is full");
        self.steps += 1;
        let start = Instant::now();
        while self.slab.in_flight() > 0 {
            assert!(start.elapsed() < HANG, "an honest rank is not read any more");
            std::thread::sleep(Duration::from_micros(100));
        }
    }

    /// How many records it shipped.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Leaves in good order; how many records it shipped.
    pub fn leave(self) -> u64 {
        // Whether it is still read is what `ship` asks.
        let _ = send(&self.stream, &bytes(&ToAgent::Bye), &[]);
        self.steps
    }
}

/// A process that does what the input says.
#[derive(Default)]
pub struct Other {
    slab: Option<SlabWriter>,
    stream: Option<UnixStream>,
}

/// What it does next.
#[derive(Arbitrary, Debug)]
enum Act {
    Connect,
    Hello { with: Brings },
    Model { number: u32, modules: u16, long: bool },
    Others { modules: u16 },
    Notice { text: String, times: u8 },
    Another { lies: bool, with: Brings },
    Lost { rank: u8, count: u64 },
    Bye,
    Answer { id: u8, revision: u64, clauses: u16 },
    Garbage { bytes: Vec<u8> },
    Giant { claims: u32 },
    Half,
    Disconnect,
    Record { pieces: u8, lies: Lie },
    Scribble { at: u16, value: u64 },
    Loss { count: u64 },
    Pause,
}

/// The descriptors that ride on a hello.
#[derive(Arbitrary, Debug)]
enum Brings {
    Slab,
    TheSameSlab,
    Nothing,
    Pipe,
    Device,
    Folder,
    Unsealed,
    Small,
    Lying { ring_len: u64 },
    Many,
}

/// What is wrong with a record.
#[derive(Arbitrary, Debug)]
enum Lie {
    Nothing,
    Rank(u32),
    Length(u16),
    Shape(Vec<u64>),
    Axes { index: u32, size: u32, place: u8 },
    Scale(f64),
    Name(u16),
    Refused,
    Replica,
    Meta(Vec<u8>),
}

impl Other {
    /// One step.
    pub fn act(&mut self, agent: &Agent, input: &mut Unstructured<'_>) -> Result<()> {
        // Errors of a socket are the agent's answer to what was said.
        let _ = match input.arbitrary::<Act>()? {
            Act::Connect => {
                self.stream = Some(agent.connect());
                Ok(())
            }
            Act::Hello { with } => return self.hello(agent, &with, input),
            Act::Another { lies, with } => {
                let rank = input.int_in_range(0..=4)?;
                let mut owned = Vec::new();
                let fds = self.brought(&with, rank, &mut owned);
                let id = self.slab.as_ref().map_or(0, |slab| slab.mapping().header().id) ^ u64::from(lies);
                self.stream.iter().try_for_each(|stream| send(stream, &bytes(&ToAgent::Slab { id }), &fds))
            }
            Act::Lost { rank, count } => self.say(&ToAgent::Lost { rank: rank.into(), count }),
            Act::Model { number, modules, long } => {
                let name = "m".repeat(if long { 3000 } else { 1 });
                let module = |n| ModuleInfo { name: format!("{name}.{n}"), class: name.clone(), kinds: n };
                self.say(&ToAgent::Model {
                    model: number,
                    modules: (0..u32::from(modules % 500)).map(module).collect(),
                })
            }
            Act::Others { modules } => {
                self.say(&ToAgent::Others { modules: (0..modules % 2000).map(|n| n.to_string()).collect() })
            }
            Act::Notice { text, times } => {
                (0..times).try_for_each(|n| self.say(&ToAgent::Notice(format!("{text}{n}").repeat(times.into()))))
            }
            Act::Bye => self.say(&ToAgent::Bye),
            Act::Answer { id, revision, clauses } => {
                let ids = (0..u32::from(clauses % 1999)).collect();
                let clauses = (0..clauses % 2000).map(|n| n.to_string()).collect();
                let (since, open) = (Since::default(), Some(revision));
                let answer = Answer::Plan { revision, since, heard: revision, open, clauses, ids };
                self.say(&ToAgent::Answer { id: id.into(), answer })
            }
            Act::Garbage { bytes } => self.send(&bytes),
            Act::Giant { claims } => self.send(&claims.to_le_bytes()),
            Act::Half => self.send(&bytes(&ToAgent::Notice("half".into()))[..6]),
            Act::Disconnect => {
                self.stream = None;
                Ok(())
            }
            Act::Record { pieces, lies } => {
                self.record(pieces, lies, input)?;
                Ok(())
            }
            Act::Scribble { at, value } => {
                if let Some(slab) = &self.slab {
                    let (base, len) = slab.mapping().whole();
                    // SAFETY: eight bytes inside the mapping, of which nobody here has a reference.
                    unsafe { base.add(usize::from(at) % (len - 8)).cast::<u64>().write_unaligned(value) };
                }
                Ok(())
            }
            Act::Loss { count } => {
                self.slab.iter().for_each(|slab| slab.mapping().header().dropped.store(count, Ordering::Relaxed));
                Ok(())
            }
            Act::Pause => {
                std::thread::sleep(Duration::from_millis(1));
                Ok(())
            }
        };
        Ok(())
    }

    /// Whoever reads its slab is done with it: there are frames that would be waited for.
    pub fn end(self) {
        self.slab.iter().for_each(|slab| slab.mapping().header().head.store(1 << 62, Ordering::Release));
    }

    fn hello(&mut self, agent: &Agent, with: &Brings, input: &mut Unstructured<'_>) -> Result<()> {
        let rank = *input.choose(&[0, 1, 1, 2, 3, 4, u32::MAX])?;
        let mut said = hello(rank, *input.choose(&[1, 2, 4, 4, u32::MAX, 0])?, input.int_in_range(1..=5)?);
        if input.ratio(1, 8)? {
            said.version = input.arbitrary()?;
        }
        if input.ratio(1, 8)? {
            (said.node, said.command) = (input.arbitrary()?, vec!["x".repeat(100); input.int_in_range(0..=500)?]);
        }
        let mut owned = Vec::new();
        let fds = self.brought(with, rank, &mut owned);
        let stream = self.stream.get_or_insert_with(|| agent.connect());
        // As for what else is said.
        let _ = send(stream, &bytes(&ToAgent::Hello(said)), &fds);
        Ok(())
    }

    /// The descriptors, of which those in `owned` are open as long as that is.
    fn brought(&mut self, with: &Brings, rank: u32, owned: &mut Vec<OwnedFd>) -> Vec<RawFd> {
        match with {
            Brings::Slab | Brings::TheSameSlab => {
                if self.slab.is_none() || matches!(with, Brings::Slab) {
                    self.slab.take().into_iter().for_each(|slab| Other { slab: Some(slab), stream: None }.end());
                    self.slab = SlabWriter::create(SLAB, rank).ok();
                }
                self.slab.iter().map(fd_of).collect()
            }
            Brings::Nothing => vec![],
            Brings::Pipe => {
                let (read, write) = io::pipe().expect("a pipe");
                owned.extend([OwnedFd::from(read), OwnedFd::from(write)]);
                vec![owned[0].as_raw_fd()]
            }
            Brings::Device => keep(owned, File::open("/dev/zero").expect("a device").into()),
            Brings::Folder => keep(owned, File::open("/").expect("a folder").into()),
            Brings::Unsealed => keep(owned, memory(1 << 20, None, false)),
            Brings::Small => keep(owned, memory(100, None, true)),
            Brings::Lying { ring_len } => keep(owned, memory(1 << 20, Some(*ring_len), true)),
            Brings::Many => vec![2; 40],
        }
    }

    fn record(&mut self, pieces: u8, lies: Lie, input: &mut Unstructured<'_>) -> Result<()> {
        let Some(slab) = &mut self.slab else { return Ok(()) };
        let mut meta = RecordMeta::output("other", DType::UInt8, vec![64]);
        (meta.step, meta.rank) = (input.int_in_range(0..=3)?, slab.mapping().header().rank);
        let mut len = 64;
        match lies {
            Lie::Nothing => {}
            Lie::Rank(rank) => meta.rank = rank,
            Lie::Length(n) => len = n,
            Lie::Shape(shape) => meta.shape = shape,
            Lie::Axes { index, size, place } => {
                let place = match place % 5 {
                    0 => Placement::Shard { dim: 0 },
                    1 => Placement::Replicate,
                    2 => Placement::Flat { shape: vec![index.into(), size.into()] },
                    3 => Placement::HeadTail { dim: 0 },
                    _ => Placement::Partial,
                };
                meta.axes = vec![Axis { name: "dp".into(), index, size, place, input_digest: None }];
            }
            Lie::Scale(scale) => meta.loss_scale = wire::loss_scale::LossScale(scale),
            Lie::Name(n) => meta.module = "n".repeat(n.into()),
            Lie::Refused => meta.refused = "refused".into(),
            Lie::Replica => meta.same = Some(7),
            Lie::Meta(bytes) => {
                if let Some(slot) = slab.try_reserve(1, &bytes, 0, 64, 64) {
                    slot.commit();
                }
                return Ok(());
            }
        }
        let payload = vec![3; usize::from(len) % 20_000];
        if pieces < 128 {
            put(slab, &meta, &payload);
            return Ok(());
        }
        // In pieces, of which not all come.
        let mut head = Vec::new();
        meta.encode(&mut head);
        let number = slab.begin_record();
        for n in 0..pieces % 4 {
            let head: &[u8] = if n == 0 { &head } else { &[] };
            if let Some(slot) = slab.try_reserve(number, head, u64::from(n) * 16, 16, 64) {
                if pieces & 4 == 0 { slot.commit() } else { std::mem::forget(slot) }
            }
        }
        Ok(())
    }

    fn say(&self, message: &ToAgent) -> io::Result<()> {
        self.send(&bytes(message))
    }

    fn send(&self, bytes: &[u8]) -> io::Result<()> {
        self.stream.iter().try_for_each(|stream| send(stream, bytes, &[]))
    }
}

fn keep(owned: &mut Vec<OwnedFd>, fd: OwnedFd) -> Vec<RawFd> {
    owned.push(fd);
    owned.iter().map(AsRawFd::as_raw_fd).collect()
}

fn hello(rank: u32, world: u32, pid: u32) -> Hello {
    Hello {
        version: CONTROL_VERSION,
        rank,
        world,
        pid,
        node: "here".into(),
        torch: "2.11.0".into(),
        python: "3.11.7".into(),
        command: vec!["train.py".into()],
        hooks: "*".into(),
        on_full: OnFull::Wait,
        wrapper: String::new(),
        job: Box::new(JobSigns { group: u64::from(world > 1), launch: "here".into(), ..JobSigns::default() }),
    }
}

fn bytes(message: &ToAgent) -> Vec<u8> {
    encode(message).unwrap_or_default()
}

fn fd_of(slab: &SlabWriter) -> RawFd {
    slab.mapping().fd().expect("a slab of ours is open").as_raw_fd()
}

/// Ships a tensor in one piece, if there is room.
fn put(slab: &mut SlabWriter, meta: &RecordMeta, payload: &[u8]) -> bool {
    let mut head = Vec::new();
    meta.encode(&mut head);
    let (number, len) = (slab.begin_record(), payload.len() as u64);
    let Some(slot) = slab.try_reserve(number, &head, 0, len, len) else { return false };
    // SAFETY: the reservation owns that many bytes.
    unsafe { std::ptr::copy_nonoverlapping(payload.as_ptr(), slot.payload(), payload.len()) };
    slot.commit();
    true
}

/// Memory that is no slab, or says something else of itself than it is.
fn memory(len: u64, ring_len: Option<u64>, sealed: bool) -> OwnedFd {
    // SAFETY: a name that ends with a zero, and known flags.
    let raw = unsafe { libc::memfd_create(c"fuzz".as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING) };
    assert!(raw >= 0, "{}", io::Error::last_os_error());
    // SAFETY: memfd_create just gave us this descriptor.
    let mut file = unsafe { File::from_raw_fd(raw) };
    file.set_len(len).expect("memory");
    if let Some(ring_len) = ring_len {
        let mut head = wire::slab::MAGIC.to_le_bytes().to_vec();
        head.extend(u64::from(wire::slab::SLAB_VERSION).to_le_bytes());
        head.extend(ring_len.to_le_bytes());
        file.write_all(&head).expect("memory");
    }
    if sealed {
        // SAFETY: the descriptor is ours and allows sealing.
        unsafe { libc::fcntl(raw, libc::F_ADD_SEALS, libc::F_SEAL_SHRINK | libc::F_SEAL_GROW) };
    }
    file.into()
}

/// Sends `bytes` with descriptors on the first of them.
fn send(mut stream: &UnixStream, bytes: &[u8], fds: &[RawFd]) -> io::Result<()> {
    #[repr(align(8))]
    struct Ancillary([u8; 256]);
    let mut ancillary = Ancillary([0; 256]);
    let slices = [IoSlice::new(bytes)];
    let len = size_of_val(fds) as u32;
    // SAFETY: msghdr is plain data; every pointer in it outlives the call; the buffer has room for 40 descriptors.
    let sent = unsafe {
        let mut message: libc::msghdr = std::mem::zeroed();
        (message.msg_iov, message.msg_iovlen) = (slices.as_ptr().cast_mut().cast(), 1);
        if !fds.is_empty() {
            message.msg_control = ancillary.0.as_mut_ptr().cast();
            message.msg_controllen = libc::CMSG_SPACE(len) as usize;
            let header = libc::CMSG_FIRSTHDR(&message);
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = libc::SCM_RIGHTS;
            (*header).cmsg_len = libc::CMSG_LEN(len) as usize;
            let data = libc::CMSG_DATA(header).cast::<RawFd>();
            std::ptr::copy_nonoverlapping(fds.as_ptr(), data, fds.len());
        }
        libc::sendmsg(stream.as_raw_fd(), &message, libc::MSG_NOSIGNAL)
    };
    let sent = usize::try_from(sent).map_err(|_| io::Error::last_os_error())?;
    stream.write_all(&bytes[sent..])
}
