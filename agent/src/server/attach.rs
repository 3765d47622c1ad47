//! One connection: hello, welcome, messages, goodbye.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
    time::Duration,
};

use tokio::{
    io::Interest,
    net::UnixStream,
    sync::{OwnedSemaphorePermit, Semaphore},
};
use wire::{
    control::{self, CONTROL_VERSION, FromAgent, Hello, MAX_BODY},
    slab::SlabReader,
};

use super::{
    Arrival, Server, ingest,
    listed::ToAgent,
    session::{Session, inode_of},
    socket::{CHUNK, receive},
};

/// How long a connection may take to say hello.
const HELLO: Duration = Duration::from_secs(10);

/// How long a long message may stop in the middle.
const STALLED: Duration = Duration::from_secs(10);
/// What a message may be long, and need no room of [`LONG_ROOM`].
const SHORT: usize = 64 << 10;
/// Bytes of long messages that all connections hold together: one of the longest.
pub const LONG_ROOM: usize = MAX_BODY + 4;

/// A connection and what came over it.
struct Line {
    stream: UnixStream,
    inbox: Vec<u8>,
    fd: Option<OwnedFd>,
    /// Room for long messages, and how much of it the last message has.
    long: Arc<Semaphore>,
    held: Option<OwnedSemaphorePermit>,
}

impl Line {
    /// The next message; `None` at the end of the connection. The room of the one before is given back: it is done with.
    async fn next(&mut self) -> io::Result<Option<ToAgent>> {
        if self.held.take().is_some() {
            self.inbox.shrink_to(SHORT);
        }
        loop {
            let next = control::decode_next(&mut self.inbox);
            if let Some(message) = next.map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))? {
                return Ok(Some(message));
            }
            self.make_room().await?;
            match &self.held {
                None => self.stream.readable().await?,
                Some(_) => tokio::time::timeout(STALLED, self.stream.readable()).await??,
            }
            let (stream, inbox, fd) = (&self.stream, &mut self.inbox, &mut self.fd);
            match stream.try_io(Interest::READABLE, || receive(stream, inbox, fd)) {
                Ok(0) => return Ok(None),
                Ok(_) => {}
                Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
                Err(e) => return Err(e),
            }
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
        self.inbox.reserve_exact((len + CHUNK).saturating_sub(self.inbox.len()));
        Ok(())
    }

    /// Best effort: a peer that does not read its answer is gone or will be.
    async fn say(&self, message: FromAgent) {
        let Ok(bytes) = control::encode(&message) else { return };
        if self.stream.writable().await.is_ok() {
            let _ = self.stream.try_write(&bytes);
        }
    }
}

/// Serves a connection until it ends.
pub async fn serve(server: Arc<Server>, stream: UnixStream, arrival: Arrival) {
    let mut line = Line { stream, inbox: Vec::new(), fd: None, long: server.long.clone(), held: None };
    let arrived = tokio::select! {
        biased;
        arrived = arrive(&server, &mut line) => arrived,
        () = arrival.newcomer.over(HELLO) => Err("a process connected and said nothing".into()),
    };
    drop(arrival);
    let (session, connection) = match arrived {
        Ok(Some(session)) => session,
        Ok(None) => return,
        Err(why) => {
            server.board.trouble_once(&why);
            return line.say(FromAgent::Refused(why)).await;
        }
    };
    let Ok(_seat) = server.connected.try_acquire() else {
        session.hang_up(connection, false);
        return line.say(FromAgent::Refused(too_many(server.max_ranks))).await;
    };
    line.say(FromAgent::Welcome).await;
    let mut in_good_order = false;
    loop {
        tokio::select! {
            () = session.damaged.notified() => {
                return line.say(FromAgent::Refused("its shared memory is damaged".into())).await;
            }
            message = line.next() => match message {
                Ok(Some(ToAgent::Model { model, modules })) => server.board.model(session.rank, model, &modules),
                Ok(Some(ToAgent::Others { modules })) => server.board.others(session.rank, &modules),
                Ok(Some(ToAgent::Notice(text))) => _ = server.board.notice(&text),
                Ok(Some(ToAgent::Bye)) => in_good_order = true,
                Ok(Some(ToAgent::Hello(hello))) if hello.rank == session.rank => server.board.attached(&hello),
                Ok(Some(ToAgent::Hello(_))) => {}
                Ok(None) => break,
                Err(e) => {
                    if e.kind() == io::ErrorKind::InvalidData {
                        server.board.trouble(&format!("rank {}: {e}; its connection is closed", session.rank));
                    }
                    break;
                }
            }
        }
    }
    session.hang_up(connection, in_good_order);
}

/// Takes the hello and the slab. `None`: somebody looked whether an agent is there, or had one thing to say, and left.
async fn arrive(server: &Arc<Server>, line: &mut Line) -> Result<Option<(Arc<Session>, u32)>, String> {
    // SAFETY: getuid has no effects and cannot fail.
    let own = unsafe { libc::getuid() };
    if line.stream.peer_cred().map_or(u32::MAX, |c| c.uid()) != own {
        return Err("a process of another user wanted to attach".into());
    }
    let hello = match line.next().await {
        Ok(None) => return Ok(None),
        Ok(Some(ToAgent::Hello(hello))) => hello,
        Ok(Some(ToAgent::Notice(text))) => {
            server.board.notice(&text);
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
    let fd = line.fd.take().ok_or_else(|| format!("{who} brought no shared memory"))?;
    attach(server, &hello, fd).map(Some).map_err(|why| format!("{who}: {why}"))
}

fn too_many(ranks: usize) -> String {
    format!("{ranks} ranks are attached already, as many as the limit on open files (ulimit -Hn) of the agent allows")
}

/// Starts reading a rank's slab, or goes on with it.
fn attach(server: &Arc<Server>, hello: &Hello, fd: OwnedFd) -> Result<(Arc<Session>, u32), String> {
    let mut sessions = server.sessions();
    let inode = inode_of(fd.as_fd()).map_err(|e| e.to_string())?;
    let key = (hello.rank, hello.pid, inode);
    if let Some(session) = sessions.get(&key)
        && let Some(connection) = session.adopt()
    {
        server.board.attached(hello);
        return Ok((session.clone(), connection));
    }
    sessions.retain(|_, s| !s.is_done());
    if sessions.len() >= server.max_ranks {
        return Err(too_many(server.max_ranks));
    }
    if server.board.is_another_job(hello) {
        server.store.forget_job();
    }
    let reader = SlabReader::attach(fd).map_err(|e| e.to_string())?;
    let session = Arc::new(Session::new(hello.rank, reader.mapping().clone()));
    // Before anything is read: what is gathered names other ranks of the job.
    server.board.attached(hello);
    ingest::start(server.clone(), session.clone(), reader).map_err(|e| format!("no thread for it: {e}"))?;
    sessions.insert(key, session.clone());
    server.beat_for(session.clone());
    Ok((session, 0))
}
