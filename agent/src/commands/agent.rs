//! `flexmodel agent`: the sidecar alone.

use std::{
    io::{self, BufRead, Write},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::{Arc, OnceLock, mpsc::RecvTimeoutError},
    time::Duration,
};

use anyhow::{Context, anyhow};
use flexmodel_run::{
    format::RunInfo,
    write::{
        DEFAULT_SHARD_BYTES, Options, Store,
        account::{ByRank, NEVER_READ},
        dir::{above_nodes, of_this_node},
    },
};
use tokio::{
    net::{TcpListener, UnixListener},
    signal::unix::{SignalKind, signal},
    sync::mpsc,
    time::{MissedTickBehavior, interval},
};

use super::run::private;
use crate::{
    dashboard, descriptors, say,
    server::{
        PATIENCE, Server, attach,
        board::Board,
        parent::{FromAgent, ToAgent},
        socket::{Listening, open_to_others},
    },
    summary,
};

/// How often `run.json` is written while it changes, and how often the parent hears of progress.
const TICK: Duration = Duration::from_millis(500);
/// The agent gives way to the job.
const NICENESS: i32 = 10;

/// Where it listens and writes.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The unix socket that jobs attach to, in a folder that only you can write to
    #[arg(long)]
    pub socket: PathBuf,
    /// The run directory; a run that is there already is continued; {node} in it is this node's name
    #[arg(long)]
    pub out: PathBuf,
    /// Loopback port of the dashboard; 0 takes a free one
    #[arg(long, default_value_t = 0)]
    pub port: u16,
    /// Bytes of tensors in a shard file before the next one is begun
    #[arg(long, value_name = "BYTES", value_parser = wire::env::parse_bytes, default_value_t = DEFAULT_SHARD_BYTES)]
    pub shard_bytes: u64,
    /// Hooks cannot be changed while a job runs
    #[arg(long)]
    pub read_only: bool,
    /// The folder that holds the runs of all nodes, where --out has no {node} any more
    #[arg(long, hide = true)]
    pub nodes: Option<PathBuf>,
    /// Started by `flexmodel run`: JSON lines on stdin and stdout
    #[arg(long, hide = true)]
    pub child: bool,
}

/// What ends the agent.
#[derive(Debug)]
enum End {
    /// A signal.
    Asked,
    /// The parent, with the command's exit code.
    Finish(Option<i32>),
    /// The parent is gone, and so is its job.
    Orphaned,
}

/// What the parent says.
#[derive(Debug)]
enum Word {
    Said(ToAgent),
    Gone,
}

/// Runs it.
pub fn main(args: Args) -> anyhow::Result<ExitCode> {
    let child = args.child;
    match Agent::start(args) {
        Err(e) if child => {
            tell(&FromAgent::Failed(format!("{e:#}")));
            Ok(ExitCode::FAILURE)
        }
        Err(e) => Err(e),
        Ok(agent) => agent.run(),
    }
}

struct Agent {
    child: bool,
    server: Arc<Server>,
    listening: Listening,
    dashboard: std::net::TcpListener,
    token: String,
    read_only: bool,
}

impl Agent {
    fn start(args: Args) -> anyhow::Result<Self> {
        give_way();
        descriptors::raise();
        if args.child {
            say::beside_a_job();
        }
        let dashboard = bind(args.port)?;
        let token = token().context("no random numbers for the dashboard's token")?;
        if let Some(why) = open_to_others(&args.socket) {
            say::line(&why);
        }
        let listening = Listening::bind(&args.socket)?;
        let board: Arc<OnceLock<Arc<Board>>> = Arc::default();
        let told = board.clone();
        let notify = move |text: &str| match told.get() {
            Some(board) => board.trouble(text),
            None => say::line(text),
        };
        let options = Options { shard_bytes: args.shard_bytes, notify: Box::new(notify) };
        let (store, before, jobs) = Store::open(&of_this_node(&args.out), options)?;
        let board = board.get_or_init(|| Arc::new(Board::new(before.clone()))).clone();
        let finished = before.finished_ns.is_some();
        if let Err(e) = board.live().replay(store.dir().path(), store.totals(), finished) {
            board.trouble(&format!("the dashboard does not show all of {}: {e}", store.dir().path().display()));
        }
        board.show_again(&before);
        save(&store, &board);
        let server = Server::new(store, board, jobs, args.nodes.or_else(|| above_nodes(&args.out)), args.read_only)
            .context("cannot start a thread")?;
        Ok(Self { child: args.child, server, listening, dashboard, token, read_only: args.read_only })
    }

    fn run(self) -> anyhow::Result<ExitCode> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .context("cannot start the agent's threads")?;
        let end = runtime.block_on(self.serve())?;
        let pulse = self.child.then(|| Pulse::start(self.server.clone()));
        self.server.drain();
        let live = self.server.board.live();
        // An agent that is asked to end leaves the ranks where they are.
        let over = !matches!(end, End::Asked);
        self.server.store.finish(over).iter().for_each(|told| live.told(told));
        let exit_code = if let End::Finish(code) = end { code } else { None };
        let run = self.server.store.dir().path();
        let info = if live.is_shown_again() {
            // Nothing came: how the run ended stays as it is.
            self.server.store.dir().read_info()
        } else {
            self.server.board.finish(&self.server.store, exit_code)
        };
        drop(pulse);
        if self.child {
            tell(&FromAgent::Done { totals: info.totals });
        } else {
            say::lines(&summary::text(run, &info.totals));
        }
        runtime.shutdown_background();
        if self.child {
            let folder = self.listening.path().parent().map(Path::to_owned);
            drop(self.listening);
            // `run` made it and may have been killed. What is in there the job may need as long as it lives.
            match (folder, end) {
                (Some(folder), End::Orphaned) => private::remove(&folder),
                (Some(folder), End::Asked | End::Finish(_)) => _ = std::fs::remove_dir(folder),
                (None, _) => {}
            }
        }
        Ok(ExitCode::SUCCESS)
    }

    /// Until the end; then everybody who has connected is taken in.
    async fn serve(&self) -> anyhow::Result<End> {
        let listener = UnixListener::from_std(self.listening.listener()?)?;
        let address = self.dashboard.local_addr()?;
        let url = format!("http://{address}/?token={}", self.token);
        let run = self.server.store.dir().path().to_owned();
        let page = TcpListener::from_std(self.dashboard.try_clone()?)?;
        let served = dashboard::Served {
            live: self.server.board.live().clone(),
            run_dir: run.clone(),
            token: self.token.clone(),
            changer: Some(Box::new(self.server.clone())),
            read_only: self.read_only,
        };
        tokio::spawn(dashboard::serve(page, served));
        if let Err(e) = self.server.store.dir().answers_at(address.port(), &self.token) {
            self.server.board.trouble(&format!("flexmodel hooks will not find this agent: {e}"));
        }
        let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        let mut words = if self.child { listen_to_parent() } else { mpsc::unbounded_channel().1 };
        if self.child {
            tell(&FromAgent::Ready { run, dashboard: url });
        } else {
            let socket = self.listening.path().display();
            announce(&format!("flexmodel agent: socket unix:{socket}, run {}, dashboard {url}\n", run.display()));
        }
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut orphan = None;
        let mut job = None;
        let end = loop {
            tokio::select! {
                accepted = listener.accept() => match accepted {
                    Ok((stream, _)) => {
                        tokio::spawn(attach::serve(self.server.clone(), stream, self.server.arrival().await));
                    }
                    Err(e) => {
                        self.server.board.trouble_once(&format!("cannot take a rank in: {e}"));
                        tokio::time::sleep(TICK).await;
                    }
                },
                _ = terminate.recv() => break End::Asked,
                _ = interrupt.recv() => break End::Asked,
                Some(word) = words.recv() => match word {
                    Word::Said(ToAgent::Job { command, hooks, pid }) => {
                        job = Some(pid);
                        self.server.board.job(command, hooks);
                    }
                    Word::Said(ToAgent::Finish { exit_code }) => break End::Finish(exit_code),
                    Word::Gone => orphan = Some(job),
                },
                _ = tick.tick() => {
                    self.tick().await;
                    // Nobody will say when it is over: it is when the job is gone and every slab is empty.
                    if orphan.is_some_and(|job| !job.is_some_and(is_alive)) && !self.server.is_busy() {
                        break End::Orphaned;
                    }
                }
            }
        };
        self.take_in_the_rest(&listener).await;
        Ok(end)
    }

    async fn tick(&self) {
        let server = self.server.clone();
        // It writes a file. If that thread panicked, run.json is written at the end.
        let look = move || {
            let live = server.board.live();
            server.store.look().iter().for_each(|told| live.told(told));
            if !live.is_shown_again() {
                live.counted(server.store.totals());
            }
            save(&server.store, &server.board);
        };
        let _ = tokio::task::spawn_blocking(look).await;
        if self.child {
            tell(&FromAgent::Progress(self.server.store.totals()));
        }
    }

    /// A job may be over before its ranks were taken in: their slabs are in the socket's queue.
    async fn take_in_the_rest(&self, listener: &UnixListener) {
        let rest = async {
            while self.listening.somebody_waits() {
                let Ok((stream, _)) = listener.accept().await else { return };
                tokio::spawn(attach::serve(self.server.clone(), stream, self.server.arrival().await));
            }
        };
        // Bounded, whoever keeps connecting.
        let _ = tokio::time::timeout(PATIENCE, rest).await;
    }
}

/// Tells the parent how far finishing is, until it is dropped.
struct Pulse {
    _stop: std::sync::mpsc::Sender<()>,
}

impl Pulse {
    fn start(server: Arc<Server>) -> Self {
        let (stop, stopped) = std::sync::mpsc::channel();
        let beat = move || {
            while stopped.recv_timeout(TICK) == Err(RecvTimeoutError::Timeout) {
                let (totals, unsealed) = (server.store.totals(), server.store.unsealed());
                tell(&FromAgent::Finishing { totals, read: server.read(), unsealed });
            }
        };
        // Without the thread the parent does not wait as long.
        let _ = std::thread::Builder::new().name("pulse".into()).spawn(beat);
        Self { _stop: stop }
    }
}

/// Writes `run.json` if anything changed; not that of a run that is over and only shown again.
fn save(store: &Store, board: &Board) {
    if !board.live().is_shown_again() {
        board.save(store);
    }
}

/// Loopback only.
fn bind(port: u16) -> anyhow::Result<std::net::TcpListener> {
    let listener = std::net::TcpListener::bind(("127.0.0.1", port)).map_err(|e| match e.kind() {
        io::ErrorKind::AddrInUse => anyhow!("port {port} is in use; give another --port, or none for any that is free"),
        _ => anyhow!("cannot listen on port {port}: {e}; give another --port, or none for any that is free"),
    })?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// 128 random bits.
fn token() -> io::Result<String> {
    let mut bytes = [0u8; 16];
    io::Read::read_exact(&mut std::fs::File::open("/dev/urandom")?, &mut bytes)?;
    Ok(bytes.iter().map(|b| format!("{b:02x}")).collect())
}

fn give_way() {
    // SAFETY: plain system calls on this process. A file past its size limit is an error to us, not a signal.
    unsafe {
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
        // Writing to a terminal from the background must not stop it either.
        libc::signal(libc::SIGTTOU, libc::SIG_IGN);
        libc::setpriority(libc::PRIO_PROCESS, 0, NICENESS);
        // What is long and short-lived, such as a list of modules, goes back to the system when it is freed.
        libc::mallopt(libc::M_MMAP_THRESHOLD, 128 << 10);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 256 << 10);
    }
}

fn is_alive(pid: u32) -> bool {
    // SAFETY: signal 0 only asks.
    unsafe { libc::kill(pid as libc::pid_t, 0) == 0 }
}

/// Reads the parent's lines on a thread of its own: stdin cannot be waited for otherwise.
fn listen_to_parent() -> mpsc::UnboundedReceiver<Word> {
    let (send, receive) = mpsc::unbounded_channel();
    let heard = std::thread::Builder::new().name("parent".into()).spawn(move || {
        for line in io::stdin().lock().lines() {
            let Ok(line) = line else { break };
            if let Ok(word) = serde_json::from_str(&line)
                && send.send(Word::Said(word)).is_err()
            {
                return;
            }
        }
        // The agent may have ended meanwhile.
        let _ = send.send(Word::Gone);
    });
    if let Err(e) = heard {
        say::line(&format!("the agent cannot hear what started it: {e}"));
    }
    receive
}

/// One JSON line on stdout. A parent that is stopped must not stop its agent: what does not fit its pipe is left out.
fn tell(word: &FromAgent) {
    if let Ok(mut line) = serde_json::to_vec(word) {
        line.push(b'\n');
        // SAFETY: stdout's descriptor; poll and write take a valid buffer. Short lines are written whole or not at all
        // (PIPE_BUF).
        unsafe {
            let mut poll = libc::pollfd { fd: 1, events: libc::POLLOUT, revents: 0 };
            let again = matches!(word, FromAgent::Progress(_) | FromAgent::Finishing { .. });
            let patience = if again { 0 } else { 5000 };
            if libc::poll(&mut poll, 1, patience) > 0 {
                libc::write(1, line.as_ptr().cast(), line.len());
            }
        }
    }
}

/// One line on stdout. Nobody may be reading it.
fn announce(line: &str) {
    let mut out = io::stdout().lock();
    let _ = out.write_all(line.as_bytes()).and_then(|()| out.flush());
}

/// Closes the run of an agent that `died`, or that has ended without having read all: recovers, seals, counts what was
/// `lost`.
pub fn close_for_the_dead(run: &Path, exit_code: Option<i32>, died: bool, lost: &ByRank) -> anyhow::Result<RunInfo> {
    let notify = Box::new(say::line);
    let (store, before, _) = Store::open(run, Options { shard_bytes: DEFAULT_SHARD_BYTES, notify })?;
    let board = Board::new(before);
    if died {
        board.notice("the agent died during the run; what came after is not captured");
    }
    for (&rank, &count) in lost {
        store.dropped(rank, count, NEVER_READ, None);
    }
    store.finish(true);
    Ok(board.finish(&store, exit_code))
}
