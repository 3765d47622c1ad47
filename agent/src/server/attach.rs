//! One connection: hello, welcome, messages, goodbye.

use std::{
    collections::VecDeque,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{Arc, Weak},
    time::Duration,
};

use flexmodel_run::format::JobId;
use tokio::{
    io::Interest,
    net::UnixStream,
    sync::{Notify, OwnedSemaphorePermit, Semaphore},
    time::Instant,
};
use wire::{
    control::{self, CONTROL_VERSION, FromAgent, Hello, MAX_BODY, clip},
    passing,
    slab::SlabReader,
};

use super::{
    Arrival, Server, ingest,
    jobs::Member,
    listed::Heard,
    session::{Session, inode_of},
    socket::CHUNK,
};

/// Reason of what a rank lost that no agent took in.
const NOT_TAKEN: &str = "the agent did not take the rank in";
/// How long a connection may take to say hello.
const HELLO: Duration = Duration::from_secs(10);

/// How long a long message may stop in the middle.
const STALLED: Duration = Duration::from_secs(10);
/// What a message may be long, and need no room of [`LONG_ROOM`].
const SHORT: usize = 64 << 10;
/// Bytes of long messages that all connections hold together: one of the longest.
pub const LONG_ROOM: usize = MAX_BODY + 4;
/// Most descriptors that wait for their message: that of one which has come in part, and the next one's.
const MAX_WAITING: usize = 2;

/// A connection and what came over it.
struct Line {
    stream: UnixStream,
    inbox: Vec<u8>,
    /// Descriptors whose messages were not read yet: each rides on the first byte of one.
    fds: VecDeque<OwnedFd>,
    /// Room for long messages, and how much of it the last message has.
    long: Arc<Semaphore>,
    held: Option<OwnedSemaphorePermit>,
    /// When some of it came last.
    moved: Instant,
}

impl Line {
    /// The next message; `None` at the end of the connection. It may be given up while it waits, and called again.
    async fn next(&mut self) -> io::Result<Option<Heard>> {
        loop {
            let next = control::decode_next(&mut self.inbox);
            if let Some(message) = next.map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))? {
                return Ok(Some(message));
            }
            self.make_room().await?;
            match &self.held {
                None => self.stream.readable().await?,
                Some(_) => tokio::time::timeout_at(self.moved + STALLED, self.stream.readable()).await??,
            }
            let (stream, inbox, mut fd) = (&self.stream, &mut self.inbox, None);
            match stream.try_io(Interest::READABLE, || passing::receive(stream.as_fd(), inbox, CHUNK, &mut fd)) {
                Ok(0) => return Ok(None),
                Ok(_) => {
                    self.moved = Instant::now();
                    self.fds.extend(fd.filter(|_| self.fds.len() < MAX_WAITING));
                }
                Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
                Err(e) => return Err(e),
            }
        }
    }

    /// The last message is done with: its room is given back.
    fn done(&mut self) {
        if self.held.take().is_some() {
            self.inbox.shrink_to(SHORT);
        }
    }

    /// Before a long message is read there must be room for it: ranks tell of all of their modules at the same time.
    async fn make_room(&mut self) -> io::Result<()> {
        let Some(len) = control::announced(&self.inbox).filter(|&len| len > SHORT && self.held.is_none()) else {
            return Ok(());
        };
        // `decode_next` has refused what is longer than there is room for at all.
        let wanted = u32::try_from(len.min(LONG_ROOM)).unwrap_or(u32::MAX);
        let held = self.long.clone().acquire_many_owned(wanted).await;
        self.held = Some(held.map_err(io::Error::other)?);
        self.moved = Instant::now();
        self.inbox.reserve_exact((len + CHUNK).saturating_sub(self.inbox.len()));
        Ok(())
    }

    async fn refuse(&self, why: &str) {
        self.say(&FromAgent::Refused(clip(why).to_owned())).await;
    }

    /// Whether the whole message went. All that an agent says on a connection fits into the socket's buffer: a peer for which
    /// that is not so is gone or will be.
    async fn say(&self, message: &FromAgent) -> bool {
        self.say_with(message, None).await
    }

    /// The same, with a descriptor.
    async fn say_with(&self, message: &FromAgent, fd: Option<BorrowedFd<'_>>) -> bool {
        let Ok(bytes) = control::encode(message) else { return false };
        let send = || passing::send(self.stream.as_fd(), &bytes, fd);
        self.stream.writable().await.is_ok()
            && self.stream.try_io(Interest::WRITABLE, send).is_ok_and(|sent| sent == bytes.len())
    }
}

/// A rank's connection, and the slabs that came over it.
struct Attached {
    hello: Hello,
    /// The job that it is of.
    job: Member,
    /// With the number of this connection among each one's. A slab that was read to its end is unmapped.
    slabs: Vec<(Weak<Session>, u32)>,
    /// Some slab is damaged.
    damaged: Arc<Notify>,
}

impl Attached {
    fn new(hello: Hello, job: Member) -> Self {
        Self { hello, job, slabs: Vec::new(), damaged: Arc::default() }
    }

    /// Starts reading a slab of this rank, or goes on with it.
    fn take(&mut self, server: &Arc<Server>, fd: Option<OwnedFd>, id: Option<u64>) -> Result<(), String> {
        let who = format!("rank {} (process {})", self.hello.rank, self.hello.pid);
        let fd = fd.ok_or_else(|| format!("{who} brought no shared memory"))?;
        let (session, connection) =
            attach(server, &self.hello, self.job.id, fd, id, &self.damaged).map_err(|why| format!("{who}: {why}"))?;
        self.slabs.retain(|(session, _)| session.strong_count() > 0);
        self.slabs.push((Arc::downgrade(&session), connection));
        Ok(())
    }

    /// Tells every slab what has become of the connection.
    fn each(&self, tell: impl Fn(&Session, u32)) {
        for (session, connection) in &self.slabs {
            if let Some(session) = session.upgrade() {
                tell(&session, *connection);
            }
        }
    }
}

/// Serves a connection until it ends.
pub async fn serve(server: Arc<Server>, stream: UnixStream, arrival: Arrival) {
    let (long, moved) = (server.long.clone(), Instant::now());
    let mut line = Line { stream, inbox: Vec::new(), fds: VecDeque::new(), long, held: None, moved };
    let arrived = tokio::select! {
        biased;
        arrived = arrive(&server, &mut line) => arrived,
        () = arrival.newcomer.over(HELLO) => Err("a process connected and said nothing".into()),
    };
    drop(arrival);
    let mut rank = match arrived {
        Ok(Some(rank)) => rank,
        Ok(None) => return,
        Err(why) => {
            server.board.trouble_once(&why);
            return line.refuse(&why).await;
        }
    };
    let Ok(_seat) = server.connected.try_acquire() else {
        rank.each(Session::hang_up);
        return line.refuse(&too_many(server.max_ranks)).await;
    };
    let number = rank.hello.rank;
    let who = (rank.job.id, number);
    let plan = server.changes.in_force(rank.job.id.job).map(FromAgent::InForce);
    for word in plan.into_iter().chain([FromAgent::Welcome]) {
        // A rank that has heard the second and not the first would begin with other hooks.
        if !line.say(&word).await {
            return rank.each(Session::hang_up);
        }
    }
    let mut questions = server.ranks.join(who);
    tokio::spawn(server.clone().compare_plan(rank.job.id, number));
    tokio::spawn(server.clone().watch(rank.job.id));
    line.done();
    loop {
        tokio::select! {
            () = rank.damaged.notified() => {
                line.refuse("its shared memory is damaged").await;
                break;
            }
            (question, fd) = questions.next() => {
                if !line.say_with(&question, fd.as_deref().map(AsFd::as_fd)).await {
                    break;
                }
            }
            message = line.next() => {
                match message {
                Ok(Some(Heard::Model { model, modules })) => server.board.model(rank.job.id, number, model, &modules),
                Ok(Some(Heard::Others { modules })) => server.board.others(rank.job.id, number, &modules),
                Ok(Some(Heard::Notice(text))) => _ = server.board.notice(&text),
                Ok(Some(Heard::Steps(rule))) => server.board.steps(rule),
                Ok(Some(Heard::Passed(pass))) => server.store.passed(rank.job.id, number, pass),
                Ok(Some(Heard::Bye)) => rank.each(Session::part),
                Ok(Some(Heard::Hello(hello))) if hello.rank == number => server.board.attached(&hello),
                Ok(Some(Heard::Hello(_) | Heard::Lost { .. })) => {}
                Ok(Some(Heard::Answer { id, answer })) => questions.answered(id, answer),
                Ok(Some(Heard::OutOfReach { id, begun })) => server.write_off(number, id, begun),
                Ok(Some(Heard::Slab { id })) => {
                    let fd = line.fds.pop_front();
                    if let Err(why) = rank.take(&server, fd, Some(id)) {
                        server.board.trouble(&why);
                        line.refuse(&why).await;
                        break;
                    }
                }
                Ok(None) => break,
                Err(e) => {
                    if e.kind() == io::ErrorKind::InvalidData {
                        server.board.trouble(&format!("rank {number}: {e}; its connection is closed"));
                    }
                    break;
                }
                }
                line.done();
            }
        }
    }
    rank.each(Session::hang_up);
    server.store.left(rank.job.id, number);
}

/// Takes the hello and the slab. `None`: somebody looked whether an agent is there, or had one thing to say, and left.
async fn arrive(server: &Arc<Server>, line: &mut Line) -> Result<Option<Attached>, String> {
    // SAFETY: getuid has no effects and cannot fail.
    let own = unsafe { libc::getuid() };
    if line.stream.peer_cred().map_or(u32::MAX, |c| c.uid()) != own {
        return Err("a process of another user wanted to attach".into());
    }
    let hello = match line.next().await {
        Ok(None) => return Ok(None),
        Ok(Some(Heard::Hello(hello))) => hello,
        Ok(Some(Heard::Notice(text))) => {
            server.board.notice(&text);
            return Ok(None);
        }
        Ok(Some(Heard::Lost { rank, count })) => {
            server.store.dropped(rank, count, NOT_TAKEN, None);
            server.board.live().dropped(rank, count);
            return Ok(None);
        }
        Ok(Some(_)) => return Err("a process did not begin with hello".into()),
        Err(e) if e.kind() == io::ErrorKind::InvalidData => {
            return Err(format!("a process of another version of flexmodel wanted to attach ({e})"));
        }
        Err(_) => return Ok(None),
    };
    let who = format!("rank {} (process {})", hello.rank, hello.pid);
    if hello.version != CONTROL_VERSION {
        return Err(format!(
            "{who} speaks version {} and this agent speaks {CONTROL_VERSION}; use the library and the agent of one release",
            hello.version
        ));
    }
    let mut job = server.jobs.join(&hello).map_err(|why| format!("{who}: {why}"))?;
    // Before there is a part of it.
    if let Some(info) = job.news.take() {
        server.store.job(&info);
    }
    let mut rank = Attached::new(hello, job);
    rank.take(server, line.fds.pop_front(), None)?;
    Ok(Some(rank))
}

fn too_many(ranks: usize) -> String {
    format!("{ranks} ranks are attached already, as many as the limit on open files (ulimit -Hn) of the agent allows")
}

/// Starts reading a rank's slab, or goes on with it. `id`: the number that it should have.
fn attach(
    server: &Arc<Server>,
    hello: &Hello,
    job: JobId,
    fd: OwnedFd,
    id: Option<u64>,
    damaged: &Arc<Notify>,
) -> Result<(Arc<Session>, u32), String> {
    let mut sessions = server.sessions();
    let inode = inode_of(fd.as_fd()).map_err(|e| e.to_string())?;
    let key = (hello.rank, hello.pid, inode);
    if let Some(session) = sessions.get(&key)
        && let Some(connection) = session.adopt(damaged.clone())
    {
        server.board.attached(hello);
        return Ok((session.clone(), connection));
    }
    sessions.retain(|_, s| !s.is_done());
    if sessions.len() >= server.max_slabs {
        return Err(format!(
            "{} slabs are attached already, as many as the limit on open files allows",
            server.max_slabs
        ));
    }
    let reader = SlabReader::attach(fd).map_err(|e| e.to_string())?;
    if id.is_some_and(|id| id != reader.mapping().header().id) {
        return Err("the memory that it brought is not the slab that it told of".into());
    }
    let session = Arc::new(Session::new(hello.rank, job, reader.mapping().clone(), damaged.clone()));
    // Before anything is read: what is gathered names other ranks of the job.
    server.board.attached(hello);
    ingest::start(server.clone(), session.clone(), reader).map_err(|e| format!("no thread for it: {e}"))?;
    sessions.insert(key, session.clone());
    server.beat_for(session.clone());
    Ok((session, 0))
}
