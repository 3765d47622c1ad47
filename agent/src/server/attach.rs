//! One connection: hello, welcome, messages, goodbye.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
    time::Duration,
};

use tokio::{io::Interest, net::UnixStream};
use wire::{
    control::{self, CONTROL_VERSION, FromAgent, Hello, ToAgent},
    slab::SlabReader,
};

use super::{
    Arrival, MAX_SESSIONS, Server, ingest,
    session::{Session, inode_of},
    socket::receive,
};

/// How long a connection may take to say hello.
const HELLO: Duration = Duration::from_secs(10);

/// A connection and what came over it.
struct Line {
    stream: UnixStream,
    inbox: Vec<u8>,
    fd: Option<OwnedFd>,
}

impl Line {
    /// The next message; `None` at the end of the connection.
    async fn next(&mut self) -> io::Result<Option<ToAgent>> {
        loop {
            let next = control::decode_next(&mut self.inbox);
            if let Some(message) = next.map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))? {
                return Ok(Some(message));
            }
            self.stream.readable().await?;
            let (stream, inbox, fd) = (&self.stream, &mut self.inbox, &mut self.fd);
            match stream.try_io(Interest::READABLE, || receive(stream, inbox, fd)) {
                Ok(0) => return Ok(None),
                Ok(_) => {}
                Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
                Err(e) => return Err(e),
            }
        }
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
    let mut line = Line { stream, inbox: Vec::new(), fd: None };
    let arrived = arrive(&server, &mut line).await;
    drop(arrival);
    let (session, connection) = match arrived {
        Ok(Some(session)) => session,
        Ok(None) => return,
        Err(why) => {
            server.board.trouble(&why);
            return line.say(FromAgent::Refused(why)).await;
        }
    };
    line.say(FromAgent::Welcome).await;
    let mut in_good_order = false;
    loop {
        tokio::select! {
            () = session.damaged.notified() => {
                return line.say(FromAgent::Refused("its shared memory is damaged".into())).await;
            }
            message = line.next() => match message {
                Ok(Some(ToAgent::Model { model, modules })) => server.board.model(session.rank, model, modules),
                Ok(Some(ToAgent::Others { modules })) => server.board.has(session.rank, None, modules),
                Ok(Some(ToAgent::Notice(text))) => server.board.notice(&text),
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
    let hello = match tokio::time::timeout(HELLO, line.next()).await {
        Err(_) => return Err("a process connected and said nothing".into()),
        Ok(Ok(None)) => return Ok(None),
        Ok(Ok(Some(ToAgent::Hello(hello)))) => hello,
        Ok(Ok(Some(ToAgent::Notice(text)))) => {
            server.board.notice(&text);
            return Ok(None);
        }
        Ok(Ok(Some(_))) => return Err("a process did not begin with hello".into()),
        Ok(Err(e)) if e.kind() == io::ErrorKind::InvalidData => {
            return Err(format!("a process of another version of flexmodel wanted to attach ({e})"));
        }
        Ok(Err(_)) => return Ok(None),
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
    if sessions.len() >= MAX_SESSIONS {
        return Err(format!("{MAX_SESSIONS} ranks are attached already"));
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
