//! Takes ranks in and keeps what they capture.
//!
//! | module | subject |
//! |---|---|
//! | [`socket`] | the listening socket |
//! | [`attach`] | one connection: hello, welcome, messages, goodbye |
//! | [`ranks`] | the ranks that are attached, and what they are asked |
//! | [`changes`] | changes the hooks of a running job |
//! | [`asking`] | what all ranks of a job are asked for that |
//! | [`nodes`] | the same for a job that has several agents |
//! | [`jobs`] | which job a rank is of, and which attempt |
//! | [`session`] | one slab of a rank and how far along it is |
//! | [`listed`] | lists of modules, as they come over it |
//! | [`ingest`] | the thread that empties a slab into the store |
//! | [`board`] | `run.json`, notices and the dashboard's live state |
//! | [`parent`] | words between `flexmodel run` and the agent it started |
//!
//! # Invariants
//!
//! - **AGENT-1** A frame is released after its bytes are written, and a tensor's last frame after its line is.
//! - **AGENT-2** No rank waits for another's tensors: each slab has a thread, and the store's locks are never held over I/O on
//!   them. A shard's file is made, with its 1 MiB header, under the allocator's lock, once a shard.
//! - **AGENT-3** Every slab's heart beats on a thread that does nothing else, whatever the disk does.
//! - **AGENT-4** Damage in a slab, a message or a record costs that slab, connection or record, and one notice.
//! - **AGENT-5** Whoever connects and says nothing takes a bounded number of descriptors ([`crate::descriptors`]); ranks
//!   and files have theirs.
//!
//! # Memory
//!
//! The agent holds no tensor: payloads are summed and written straight from the slabs, which the jobs allocated. Of its
//! own it has, for each slab, a thread, one frame's metadata (64 KiB at most) and the places of [`ingest::MAX_OPEN`]
//! unfinished tensors; for each connection a message that has not come in full (64 KiB, and 16 MiB of longer ones for all
//! connections together); what [`board`] lists of modules, whose names are shared and bounded
//! ([`names`](flexmodel_run::names), [`owners`](flexmodel_run::ownership)); the [`store`](flexmodel_run::write)'s and the
//! [`dashboard`](crate::live)'s bounded tables. Together that stays below 64 MiB beside the slabs for a node of ordinary
//! size, and below 256 MiB whatever a job does.

pub mod asking;
pub mod attach;
pub mod board;
pub mod changes;
pub mod ingest;
pub mod jobs;
pub mod listed;
pub mod nodes;
pub mod parent;
pub mod ranks;
pub mod session;
pub mod socket;

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use flexmodel_run::{
    format::{JobInfo, Origin},
    write::{Store, account},
};
use tokio::sync::Semaphore;
use wire::slab::SlabReader;

use crate::{
    descriptors::Shares,
    newcomers::{Newcomer, Newcomers},
};
use board::Board;
use changes::Changes;
use jobs::Jobs;
use nodes::watch::Nodes;
use ranks::Ranks;
use session::Session;

/// Time between two beats of a slab's heart.
const BEAT: Duration = Duration::from_millis(50);
/// How long finishing goes on without any progress.
pub const PATIENCE: Duration = Duration::from_secs(5);
/// By rank, process and which memory it is.
type Sessions = HashMap<(u32, u32, (u64, u64)), Arc<Session>>;

/// What all connections share.
#[derive(Debug)]
pub struct Server {
    /// Where captures go.
    pub store: Arc<Store>,
    /// What people see.
    pub board: Arc<Board>,
    /// The jobs of the run.
    pub jobs: Jobs,
    sessions: Mutex<Sessions>,
    /// Slabs whose heart beats. A list of its own: nobody holds this lock for longer than a list takes.
    beating: Mutex<Vec<Arc<Session>>>,
    /// Connections that have not said hello yet.
    arriving: AtomicUsize,
    newcomers: Arc<Newcomers>,
    /// Most slabs at a time.
    max_slabs: usize,
    /// Most ranks.
    max_ranks: usize,
    /// Who is attached and can be asked.
    pub ranks: Arc<Ranks>,
    /// The hooks of jobs whose ranks are attached.
    pub changes: Changes,
    /// What this agent is among those of other nodes.
    nodes: Nodes,
    /// Connections that have said hello: two a rank, since the end of one may be noticed late.
    connected: Semaphore,
    /// Room for long messages.
    long: Arc<Semaphore>,
}

impl Server {
    /// Starts the heart as well. `jobs` are those that the run has already, `nodes` is the folder that holds the runs of several
    /// nodes, if this one is in it, and of a job that is `read_only` nobody changes hooks.
    pub fn new(
        store: Arc<Store>,
        board: Arc<Board>,
        jobs: Vec<JobInfo>,
        nodes: Option<PathBuf>,
        read_only: bool,
    ) -> std::io::Result<Arc<Self>> {
        let shares = Shares::now();
        let changes = Changes::new(store.revisions());
        let server = Arc::new(Self {
            store,
            board,
            jobs: Jobs::new(jobs),
            sessions: Mutex::default(),
            beating: Mutex::default(),
            arriving: AtomicUsize::new(0),
            newcomers: Newcomers::new(shares.arriving),
            max_slabs: 2 * shares.ranks,
            max_ranks: shares.ranks,
            ranks: Arc::default(),
            changes,
            nodes: Nodes::new(nodes, read_only),
            connected: Semaphore::new(2 * shares.ranks),
            long: Arc::new(Semaphore::new(attach::LONG_ROOM)),
        });
        let weak = Arc::downgrade(&server);
        std::thread::Builder::new().name("heart".into()).spawn(move || {
            while let Some(server) = weak.upgrade() {
                server.beat();
                drop(server);
                std::thread::sleep(BEAT);
            }
        })?;
        Ok(server)
    }

    fn beat(&self) {
        let mut beating = self.beating.lock().unwrap_or_else(PoisonError::into_inner);
        beating.retain(|session| !session.is_done());
        for session in &*beating {
            SlabReader::beat(session.mapping());
        }
    }

    fn beat_for(&self, session: Arc<Session>) {
        SlabReader::beat(session.mapping());
        self.beating.lock().unwrap_or_else(PoisonError::into_inner).push(session);
    }

    /// Unmaps slabs that were read to their end.
    fn forget_done(&self) {
        self.sessions().retain(|_, session| !session.is_done());
    }

    fn sessions(&self) -> MutexGuard<'_, Sessions> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A rank says that no agent can be given this slab any more. What was begun in it and has no line is lost, unless the
    /// slab is being read here.
    fn write_off(&self, rank: u32, slab: u64, begun: u64) {
        if self.sessions().values().any(|session| session.mapping().header().id == slab && !session.is_done()) {
            return;
        }
        let mut account = self.store.account(slab);
        let lost = account.missing(begun);
        if lost > 0 {
            account.settled = account.settled.saturating_add(lost);
            account.cut_off = begun;
            self.store.keep_account(slab, account);
            self.store.dropped(rank, lost, account::NEVER_READ, Some(Origin(slab, begun)));
            self.board.live().dropped(rank, lost);
        }
    }

    /// Somebody connected. If too many have that say nothing, the one that has waited longest goes for it.
    pub async fn arrival(self: &Arc<Self>) -> Arrival {
        let newcomer = self.newcomers.admit().await;
        self.arriving.fetch_add(1, Ordering::AcqRel);
        Arrival { server: self.clone(), newcomer }
    }

    /// Whether some rank is attached or its slab not empty yet.
    pub fn is_busy(&self) -> bool {
        self.arriving.load(Ordering::Acquire) > 0 || self.sessions().values().any(|s| !s.is_done())
    }

    /// Empties every slab of what is in it now. Gives up when nothing moves for [`PATIENCE`].
    pub fn drain(&self) {
        let mut seen = self.progress();
        let mut since = Instant::now();
        while self.is_busy() && since.elapsed() < PATIENCE {
            for session in self.sessions().values() {
                session.stop_at_head();
            }
            std::thread::sleep(Duration::from_millis(5));
            let now = self.progress();
            if now != seen {
                seen = now;
                since = Instant::now();
            }
        }
    }

    /// Changes whenever anything moves.
    fn progress(&self) -> (usize, u64, u64) {
        let open = self.sessions().values().filter(|s| !s.is_done()).count();
        (open, self.read(), self.store.totals().bytes)
    }

    /// Bytes read from the slabs that are known.
    pub fn read(&self) -> u64 {
        self.sessions().values().fold(0u64, |sum, s| sum.wrapping_add(s.tail()))
    }
}

/// A connection that has not said hello yet: finishing waits for it.
#[derive(Debug)]
pub struct Arrival {
    server: Arc<Server>,
    newcomer: Newcomer,
}

impl Drop for Arrival {
    fn drop(&mut self) {
        self.server.arriving.fetch_sub(1, Ordering::AcqRel);
    }
}
