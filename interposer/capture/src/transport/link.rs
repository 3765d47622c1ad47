//! The agent, whether or not one is there: attaches late, notices a death, attaches again. Nothing here waits, but for
//! the last word.

use std::{
    collections::VecDeque,
    io,
    os::fd::{AsRawFd, OwnedFd, RawFd},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use wire::{
    control::{self, FromAgent, Hello, MAX_FROM_AGENT, MAX_QUESTIONS, Question, ToAgent, clip},
    descriptor::{self, Descriptor},
    revision::Plan,
    store::Place,
    tap_abi::Rank,
};

use super::{
    outbox::Outbox,
    slabs::Slabs,
    socket::{self, NoConnection},
};
use crate::process::Process;

/// How often an absent agent is looked for, and a present one looked at.
pub(super) const LOOK: Duration = Duration::from_millis(500);
/// How often more is sent to an agent that did not take everything at once.
const SEND: Duration = Duration::from_millis(20);
/// Longest pause before another try at agents that take us in and are gone without a welcome: each try repeats
/// everything.
pub(super) const MAX_PAUSE: Duration = Duration::from_secs(30);
/// Most lines about agents that come and go.
const MAX_LINES: u32 = 20;

/// What an agent has said that others than the link have to deal with.
pub enum Heard {
    /// It asks something, with this number on its connection.
    Question { connection: u64, id: u64, question: Question, fd: Option<OwnedFd> },
    /// A plan is in force.
    InForce(Plan),
}

/// The link, whether or not an agent is at its end.
pub struct Link {
    socket: PathBuf,
    hello: Hello,
    process: Arc<dyn Process>,
    stream: Option<Descriptor>,
    outbox: Outbox,
    inbox: Vec<u8>,
    /// Descriptors that came with what is in the inbox.
    fds: VecDeque<OwnedFd>,
    /// What was heard and not dealt with.
    heard: VecDeque<Heard>,
    /// Connections so far.
    connections: u64,
    /// This agent has taken us in.
    welcome: bool,
    /// The last look at an agent that is there.
    looked: Option<Instant>,
    /// The last look for one, and how long until the next.
    pub(super) tried: Option<Instant>,
    pub(super) pause: Duration,
    /// The user knows that there is no agent.
    pub(super) missing: bool,
    /// There is something to capture: without an agent it is lost, and that is said.
    pub(super) matters: bool,
    /// What the system forbids, as far as the user knows.
    forbidden: Option<io::ErrorKind>,
    lines: u32,
    /// This agent refused us: do not ask again.
    refused: bool,
    /// Another user listens there: never ask again.
    foreign: bool,
    /// An agent is there, and the job has closed the memory's descriptor: only another slab can go to it.
    wants_slab: bool,
}

impl Link {
    /// A link that has not looked for its agent yet, of a process that calls itself `hello`.
    pub fn new(socket: &str, hello: Hello, process: Arc<dyn Process>) -> Self {
        Self {
            socket: socket.into(),
            hello,
            process,
            stream: None,
            outbox: Outbox::default(),
            inbox: Vec::new(),
            fds: VecDeque::new(),
            heard: VecDeque::new(),
            connections: 0,
            welcome: false,
            looked: None,
            tried: None,
            pause: LOOK,
            missing: false,
            matters: false,
            forbidden: None,
            lines: 0,
            refused: false,
            foreign: false,
            wants_slab: false,
        }
    }

    /// Fills in who this process is; an agent that is there hears of it.
    pub fn describe(&mut self, rank: Rank, wrapper: &str, slabs: &Slabs) {
        let before = self.hello.clone();
        let hello = &mut self.hello;
        (hello.rank, hello.world, hello.job.group) = (rank.rank, rank.world, rank.group);
        if !wrapper.is_empty() {
            hello.wrapper = wrapper.to_owned();
        }
        if self.stream.is_some() && self.hello != before {
            self.say(ToAgent::Hello(self.hello.clone()), slabs);
        }
    }

    /// Whether readers need to know which modules this rank has, to understand other ranks' tensors.
    pub fn tells_others(&self) -> bool {
        self.hello.world > 1 && self.outbox.tells_modules()
    }

    /// This process's rank.
    pub fn rank(&self) -> u32 {
        self.hello.rank
    }

    /// Whether this process has become another rank, or one of another process group.
    pub fn is_another(&self, rank: Rank) -> bool {
        (self.hello.rank, self.hello.job.group) != (rank.rank, rank.group)
    }

    /// The socket, for whoever waits until an agent says something.
    pub fn number(&self) -> Option<RawFd> {
        Some(self.stream.as_ref()?.get().ok()?.as_raw_fd())
    }

    /// Whether something waits to be sent.
    pub fn wants_to_send(&self) -> bool {
        !self.outbox.is_empty()
    }

    /// Whether an agent has taken us in.
    pub fn is_welcome(&self) -> bool {
        self.stream.is_some() && self.welcome
    }

    /// Whether no agent takes us in: it has refused, is not ours, or nobody listens.
    pub fn is_alone(&self) -> bool {
        self.asks_no_more() || self.stream.is_none()
    }

    /// The oldest thing that was heard and not dealt with.
    pub fn next_heard(&mut self) -> Option<Heard> {
        self.heard.pop_front()
    }

    /// Answers a question, if the agent that asked it is still there.
    pub fn answer(&mut self, connection: u64, message: ToAgent, slabs: &Slabs) {
        if connection == self.connections && self.stream.is_some() {
            self.say(message, slabs);
        }
    }

    /// Says something now, or when an agent is there and takes it.
    pub fn say(&mut self, message: ToAgent, slabs: &Slabs) {
        self.outbox.push(match message {
            ToAgent::Notice(text) => ToAgent::Notice(clip(&text).to_owned()),
            other => other,
        });
        self.send(slabs);
    }

    /// Looks, not more often than need be, whether the agent is there.
    pub fn tend(&mut self, slabs: &Slabs) {
        let due = if self.outbox.is_empty() { LOOK } else { SEND };
        if self.stream.is_none() || self.looked.is_none_or(|t| t.elapsed() >= due) {
            self.alive(slabs);
        }
    }

    /// Whether an agent is there; attaches to one that has come.
    pub fn alive(&mut self, slabs: &Slabs) -> bool {
        if self.stream.is_some() {
            self.looked = Some(Instant::now());
            if self.listen() && self.send(slabs) {
                return true;
            }
        }
        if self.asks_no_more() || self.tried.is_some_and(|t| t.elapsed() < self.pause) {
            return false;
        }
        self.attach(slabs)
    }

    /// Whether an agent is there that cannot be given the slab that tensors begin in, since the job has closed its
    /// descriptor. Said once a try.
    pub fn takes_wish_for_slab(&mut self) -> bool {
        std::mem::take(&mut self.wants_slab)
    }

    /// Tells an agent that is there, or can be attached to at once, that nothing follows. Whether it has the slabs.
    pub fn farewell(&mut self, slabs: &Slabs, limit: Duration) -> bool {
        let there = !self.asks_no_more() && (self.listen() || self.attach(slabs));
        self.say(ToAgent::Bye, slabs);
        self.wait_to_send(slabs, limit);
        there
    }

    /// Tells whoever listens of tensors that no agent has taken a slab for.
    pub fn leave_losses(&self, count: u64) {
        if !self.foreign {
            leave(&self.socket, &ToAgent::Lost { rank: self.hello.rank, count });
        }
    }

    /// Starts anew, as another rank with another slab.
    pub fn leave(&mut self) {
        self.stream = None;
        self.outbox.forget_passes();
        self.outbox.restart(Vec::new(), std::iter::empty());
        (self.tried, self.pause, self.refused) = (None, LOOK, false);
    }

    /// Says something to whoever listens, though nothing may follow.
    pub fn last_words(&mut self, text: &str, slabs: &Slabs, limit: Duration) {
        let there = self.listen() || (!self.asks_no_more() && self.attach(slabs));
        if there {
            self.say(ToAgent::Notice(text.to_owned()), slabs);
            self.wait_to_send(slabs, limit);
        } else if !self.foreign {
            leave_word(&self.socket, text);
        }
    }

    /// The first slab goes with the hello, the others follow.
    fn attach(&mut self, slabs: &Slabs) -> bool {
        if slabs.live().next().is_none() {
            return false;
        }
        self.tried = Some(Instant::now());
        let stream = match socket::connect(&self.socket) {
            Ok(stream) => stream,
            Err(why) => {
                self.pause = LOOK;
                self.not_connected(why);
                return false;
            }
        };
        let mut within_reach = slabs.within_reach();
        let Some((_, memory)) = within_reach.next().filter(|_| slabs.is_current_within_reach()) else {
            self.wants_slab = true;
            return false;
        };
        // Until there is a welcome.
        self.pause = (self.pause * 2).min(MAX_PAUSE);
        let Ok(hello) = control::encode(&ToAgent::Hello(self.hello.clone())) else { return false };
        let sent = match socket::send(&stream, &hello, Some(memory)) {
            Ok(sent) => sent,
            Err(error) => {
                self.not_sent(&error);
                return false;
            }
        };
        let others = within_reach.map(|(writer, _)| writer.mapping().header().id);
        self.outbox.restart(hello.get(sent..).unwrap_or_default().to_vec(), others);
        self.inbox.clear();
        self.fds.clear();
        self.heard.clear();
        self.connections += 1;
        self.welcome = false;
        self.looked = self.tried;
        self.stream = Some(stream);
        self.send(slabs)
    }

    fn not_connected(&mut self, why: NoConnection) {
        let socket = self.socket.display().to_string();
        match why {
            NoConnection::Absent if !self.missing && self.matters => {
                self.missing = true;
                self.line(&format!("no agent at {socket}: captures wait in memory, then are lost, until one is there"));
            }
            NoConnection::Absent => {}
            NoConnection::Foreign(user) => {
                self.foreign = true;
                self.line(&format!(
                    "user {user} listens at {socket} and is not the job's: nothing is sent there and captures are lost; \
                     use a folder that only you can write to"
                ));
            }
            NoConnection::System(call, error) => {
                self.forbids(&format!("no connection to the agent at {socket} ({call})"), &error);
            }
        }
    }

    /// Descriptors cannot be sent where words may: the agent hears of it all the same.
    fn not_sent(&mut self, error: &io::Error) {
        let what = "no shared memory can be sent to the agent (sendmsg)";
        let gone = matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset);
        if !gone && !socket::is_later(error) && self.forbids(what, error) {
            leave_word(&self.socket, &format!("{}: {what}: {error}; its captures are lost", self.process.who()));
        }
    }

    /// Says once what the system does not let this process do. Whether it was said.
    fn forbids(&mut self, what: &str, error: &io::Error) -> bool {
        let news = self.forbidden.replace(error.kind()) != Some(error.kind());
        if news {
            self.missing = true;
            self.line(&format!("{what}: {error}; captures wait in memory, then are lost, unless that changes"));
        }
        news
    }

    /// Whether there is, or can be, no agent for this process.
    fn asks_no_more(&self) -> bool {
        self.refused || self.foreign
    }

    /// Reads what the agent said, without waiting. Whether it is still there. What it said before it left counts.
    fn listen(&mut self) -> bool {
        let mut is_there = true;
        // An agent that never ends its sentence is not listened to for ever.
        while self.inbox.len() <= MAX_FROM_AGENT {
            let Some(stream) = self.stream.as_ref() else { return false };
            match socket::receive(stream, &mut self.inbox, &mut self.fds) {
                Ok(1..) => {}
                Err(e) if socket::is_later(&e) => break,
                Err(e) if descriptor::is_closed(&e) => {
                    // The agent is still there, as far as we know, and is attached to again: it did nothing to wait for.
                    (self.stream, self.pause) = (None, LOOK);
                    return false;
                }
                Ok(0) | Err(_) => {
                    is_there = false;
                    break;
                }
            }
        }
        loop {
            match control::decode_next(&mut self.inbox) {
                Ok(None) if !is_there || self.inbox.len() > MAX_FROM_AGENT => return self.lost(),
                Ok(None) => return true,
                Ok(Some(FromAgent::Welcome)) => {
                    self.pause = LOOK;
                    self.forbidden = None;
                    self.welcome = true;
                    if std::mem::take(&mut self.missing) {
                        self.line("an agent is there: captures go to it");
                    }
                }
                Ok(Some(FromAgent::Refused(why))) => {
                    self.line(&format!("the agent refused this rank: {}", clip(&why)));
                    self.refused = true;
                    self.stream = None;
                    return false;
                }
                Ok(Some(FromAgent::Ask { id, question })) => {
                    let with = matches!(question, Question::Prepare(_, Place::Shared));
                    let fd = if with { self.fds.pop_front() } else { None };
                    // An agent that has asked more than it may have open gets no answer to what is too much.
                    if self.heard.len() < MAX_QUESTIONS && !self.outbox.is_full_of_answers() {
                        self.heard.push_back(Heard::Question { connection: self.connections, id, question, fd });
                    }
                }
                Ok(Some(FromAgent::InForce(plan))) => {
                    self.heard.retain(|heard| !matches!(heard, Heard::InForce(_)));
                    self.heard.push_back(Heard::InForce(plan));
                }
                Err(_) => return self.lost(),
            }
        }
    }

    fn lost(&mut self) -> bool {
        self.stream = None;
        if !self.missing && self.matters {
            self.missing = true;
            self.line("the agent is gone: captures wait in memory, then are lost, until it is back");
        }
        false
    }

    /// Sends what the agent takes now. Whether it is still there.
    fn send(&mut self, slabs: &Slabs) -> bool {
        let Some(stream) = self.stream.as_ref() else { return false };
        let mut out_of_reach = false;
        let send = |bytes: &[u8], slab: Option<u64>| match slab.map(|id| slabs.numbered(id)) {
            None => socket::send(stream, bytes, None),
            Some(Some(writer)) => match writer.mapping().fd() {
                Ok(memory) => socket::send(stream, bytes, Some(memory)),
                Err(_) => {
                    out_of_reach = true;
                    Ok(bytes.len())
                }
            },
            // An agent has settled it: there is nothing to tell of it.
            Some(None) => Ok(bytes.len()),
        };
        let sent = self.outbox.send(send);
        self.wants_slab |= out_of_reach && !slabs.is_current_within_reach();
        match sent {
            Ok(()) => true,
            Err(_) if self.listen() => self.lost(),
            Err(_) => false,
        }
    }

    /// What a job does that closes descriptors it does not know.
    #[cfg(test)]
    pub(super) fn close_by_job(&self) {
        let number = std::os::fd::AsRawFd::as_raw_fd(&self.stream.as_ref().unwrap().get().unwrap());
        // SAFETY: the link notices that its descriptor is gone.
        unsafe { libc::close(number) };
    }

    fn wait_to_send(&mut self, slabs: &Slabs, limit: Duration) {
        let end = Instant::now() + limit;
        while self.send(slabs) && !self.outbox.is_empty() {
            let left = end.saturating_duration_since(Instant::now());
            match self.stream.as_ref() {
                Some(stream) if !left.is_zero() => socket::wait_to_send(stream, left),
                _ => return,
            }
        }
    }

    fn line(&mut self, text: &str) {
        self.lines += 1;
        if self.lines <= MAX_LINES {
            self.process.line(text);
        }
    }
}

/// Leaves one notice with an agent, if one takes it at once, from a process that has nothing else for it.
pub fn leave_word(socket: &Path, text: &str) {
    leave(socket, &ToAgent::Notice(clip(text).to_owned()));
}

fn leave(socket: &Path, message: &ToAgent) {
    if let (Ok(stream), Ok(bytes)) = (socket::connect(socket), control::encode(message)) {
        // Into an empty buffer it goes whole, or there is nobody to read it.
        let _ = socket::send(&stream, &bytes, None);
    }
}
