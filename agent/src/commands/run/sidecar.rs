//! The agent as a child of `flexmodel run`.

use std::{
    io::{BufRead, BufReader, Write},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, ExitStatus, Stdio},
    sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    time::{Duration, Instant},
};

use anyhow::{Context, anyhow, bail};
use flexmodel_run::{
    format::Totals,
    write::account::{self, ByRank},
};
use wire::counts::Counts;

use super::{job::Ended, prepare::Plan, private::PrivateFolder, words};
use crate::server::parent::{FromAgent, ToAgent};

/// Longest time an agent may take to be ready.
const STARTING: Duration = Duration::from_secs(60);
/// Longest time without a word of an agent that is finishing: it says one twice a second, unless it is stopped.
const SILENT: Duration = Duration::from_secs(10);
/// Longest time in which an agent that is finishing has read nothing and sealed no shard.
const STUCK: Duration = Duration::from_secs(60);
/// Longest time for a process to be gone that has said its last.
const GONE: Duration = Duration::from_secs(10);

/// What happens while the command runs.
pub enum News {
    /// The agent is dead, and how that came; told once.
    AgentDied(String),
    /// The command is over.
    JobEnded(Ended),
}

/// A line of the agent's, or something else that `run` waits for.
pub enum Event {
    /// The agent said something.
    Said(FromAgent),
    /// The agent closed its stdout.
    Silent,
    /// The command is over.
    JobEnded(Ended),
}

/// The agent, in a process group of its own: what kills or interrupts it does not reach the job, nor the other way.
pub struct Sidecar {
    child: Child,
    words: Sender<ToAgent>,
    events: Receiver<Event>,
    sender: Sender<Event>,
    run: PathBuf,
    dashboard: String,
    socket: PathBuf,
    library: PathBuf,
    totals: Totals,
    /// What the job's ranks capture, whether or not an agent reads it, and what the run knew of before they began.
    counts: Option<Counts>,
    before: ByRank,
    finishing: (u64, usize),
    done: bool,
    silent: bool,
    told: bool,
    _folder: PrivateFolder,
}

/// What ranks captured, and what the run knew of before they began.
pub struct Counted {
    captured: ByRank,
    before: ByRank,
}

impl Counted {
    /// What the run, which nobody writes to any more, does not know of.
    pub fn never_read(&self, run: &Path) -> ByRank {
        // A manifest that cannot be read is a trouble of its own, and tells of no losses.
        let Ok(now) = account::known(run) else { return ByRank::new() };
        account::unknown(&self.captured, &self.before, &now)
    }
}

impl Sidecar {
    /// Starts it and waits until ranks may attach.
    pub fn start(plan: &Plan) -> anyhow::Result<Self> {
        let folder = PrivateFolder::make(&plan.library)?;
        let (socket, library) = (folder.socket(), folder.library().to_owned());
        let exe = std::env::current_exe().context("cannot tell where flexmodel is")?;
        let mut command = Command::new(exe);
        command.arg("agent").arg("--child").arg("--socket").arg(&socket).arg("--out").arg(&plan.out);
        command.arg("--port").arg(plan.port.to_string());
        if let Some(nodes) = &plan.nodes {
            command.arg("--nodes").arg(nodes);
        }
        if plan.read_only {
            command.arg("--read-only");
        }
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).process_group(0);
        let mut child = command.spawn().context("cannot start the agent")?;
        let words = speaker(child.stdin.take().context("the agent has no stdin")?)?;
        let said = child.stdout.take().context("the agent has no stdout")?;
        let (sender, events) = channel();
        let send = sender.clone();
        std::thread::Builder::new().name("agent".into()).spawn(move || {
            for line in BufReader::new(said).lines() {
                let Ok(line) = line else { break };
                if let Ok(said) = serde_json::from_str(&line)
                    && send.send(Event::Said(said)).is_err()
                {
                    return;
                }
            }
            // The receiver lives as long as the process.
            let _ = send.send(Event::Silent);
        })?;
        let (run, dashboard) = match events.recv_timeout(STARTING) {
            Ok(Event::Said(FromAgent::Ready { run, dashboard })) => (run, dashboard),
            Ok(Event::Said(FromAgent::Failed(why))) => {
                // It exits by itself.
                reap(&mut child);
                bail!("{why}");
            }
            Err(RecvTimeoutError::Timeout) => {
                let _ = child.kill();
                reap(&mut child);
                bail!("the agent did not start within {} seconds; is the disk of --out very slow?", STARTING.as_secs());
            }
            _ => return Err(anyhow!("the agent {} before it was ready", how(&mut child))),
        };
        let before = account::known(&run).unwrap_or_default();
        Ok(Self {
            counts: Counts::create().ok(),
            before,
            child,
            words,
            events,
            sender,
            run,
            dashboard,
            socket,
            library,
            totals: Totals::default(),
            finishing: (0, 0),
            done: false,
            silent: false,
            told: false,
            _folder: folder,
        })
    }

    /// The run directory.
    pub fn run(&self) -> &Path {
        &self.run
    }

    /// The dashboard's address.
    pub fn dashboard(&self) -> &str {
        &self.dashboard
    }

    /// Where ranks attach.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The preload library, by a path that the dynamic linker takes for one.
    pub fn library(&self) -> &Path {
        &self.library
    }

    /// Counters that the agent told last.
    pub fn last_totals(&self) -> Totals {
        self.totals
    }

    /// For whoever waits for the command.
    pub fn sender(&self) -> Sender<Event> {
        self.sender.clone()
    }

    /// Tells the agent what was started.
    pub fn tell_job(&mut self, plan: &Plan, pid: u32) {
        self.tell(ToAgent::Job { command: words(&plan.command), hooks: plan.hooks.clone(), pid });
    }

    /// Tells the agent that the command is over. If somebody has stopped it, it goes on: it has to write what it has.
    pub fn finish(&mut self, exit_code: Option<i32>) {
        self.tell(ToAgent::Finish { exit_code });
        if let Some(pid) = self.alive() {
            // SAFETY: plain system call; a child that was not waited for keeps its number.
            unsafe { libc::kill(pid as libc::pid_t, libc::SIGCONT) };
        }
    }

    fn tell(&self, word: ToAgent) {
        // One that cannot be told anything any more is dead, which its stdout tells.
        let _ = self.words.send(word);
    }

    /// Where ranks count what they capture, in the words of the environment. `None`: there is no memory for it.
    pub fn counts(&self, agent: &str) -> Option<String> {
        self.counts.as_ref().map(|counts| counts.name(agent))
    }

    /// What the job's ranks have captured so far.
    pub fn counted(&self) -> Counted {
        let captured = self.counts.as_ref().map(Counts::by_rank).unwrap_or_default();
        Counted { captured, before: self.before.clone() }
    }

    /// The next thing that happens.
    pub fn news(&mut self) -> News {
        loop {
            // This struct holds a sender: receiving cannot fail.
            let Ok(event) = self.events.recv() else { continue };
            match event {
                Event::Said(said) => _ = self.hear(said),
                Event::Silent => {
                    (self.silent, self.told) = (true, true);
                    return News::AgentDied(how(&mut self.child));
                }
                Event::JobEnded(ended) => return News::JobEnded(ended),
            }
        }
    }

    /// The final counters; `None` if the agent died, has not said a word for [`SILENT`] or has not got on for [`STUCK`].
    pub fn wait_for_totals(&mut self) -> Option<Totals> {
        let mut moved = Instant::now();
        while !self.done && !self.silent {
            match self.events.recv_timeout(SILENT.min(STUCK.saturating_sub(moved.elapsed()))) {
                Ok(Event::Said(said)) => {
                    if self.hear(said) {
                        moved = Instant::now();
                    }
                }
                Ok(Event::JobEnded(_)) => {}
                Ok(Event::Silent) => self.silent = true,
                Err(_) => return None,
            }
        }
        // It has said its last, and only exits now.
        reap(&mut self.child);
        self.done.then_some(self.totals)
    }

    /// How the agent ended, if it died and nobody has said so yet.
    pub fn untold_death(&mut self) -> Option<String> {
        (self.silent && !self.done && !self.told).then(|| {
            self.told = true;
            how(&mut self.child)
        })
    }

    /// Whether the agent got on since its last word.
    fn hear(&mut self, said: FromAgent) -> bool {
        let before = (self.totals, self.finishing);
        match said {
            FromAgent::Progress(totals) => self.totals = totals,
            FromAgent::Finishing { totals, read, unsealed } => {
                (self.totals, self.finishing) = (totals, (read, unsealed))
            }
            FromAgent::Done { totals } => {
                self.totals = totals;
                self.done = true;
            }
            FromAgent::Ready { .. } | FromAgent::Failed(_) => {}
        }
        before != (self.totals, self.finishing)
    }

    /// Its process, if it is there.
    pub fn alive(&mut self) -> Option<u32> {
        matches!(self.child.try_wait(), Ok(None)).then(|| self.child.id())
    }
}

/// A thread that says what the agent is told: one that is stopped, and whose pipe is full, holds up nobody else.
fn speaker(mut stdin: ChildStdin) -> std::io::Result<Sender<ToAgent>> {
    let (send, words) = channel();
    std::thread::Builder::new().name("words".into()).spawn(move || {
        for word in words {
            let line = serde_json::to_vec(&word).map(|line| [&line[..], b"\n"].concat());
            if line.map_err(std::io::Error::from).and_then(|line| stdin.write_all(&line)).is_err() {
                return;
            }
        }
    })?;
    Ok(send)
}

/// Waits for a process that is about to end.
fn reap(child: &mut Child) -> Option<ExitStatus> {
    let start = Instant::now();
    while start.elapsed() < GONE {
        match child.try_wait() {
            Ok(None) => std::thread::sleep(Duration::from_millis(5)),
            Ok(status) => return status,
            Err(_) => return None,
        }
    }
    None
}

/// How a child that closed its stdout ended.
fn how(child: &mut Child) -> String {
    use std::os::unix::process::ExitStatusExt;
    match reap(child) {
        Some(status) => match status.signal() {
            Some(signal) => format!("was killed by signal {signal}"),
            None => format!("ended with code {}", status.code().unwrap_or(-1)),
        },
        None => "is gone".into(),
    }
}
