//! What people see of the run: `run.json`, notices, and the dashboard's live state.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{SystemTime, UNIX_EPOCH},
};

use wire::control::{Hello, MAX_MODELS, MAX_NOTICES, ModuleInfo, clip};

use crate::{
    live::Live,
    say,
    store::{
        Store,
        format::{FORMAT, ModelInfo, RunInfo},
        owners,
    },
};

/// Most ranks whose process is remembered.
const MAX_RANKS: usize = 1 << 16;

/// Collects what is known of the run.
pub struct Board {
    info: Mutex<RunInfo>,
    live: Arc<Live>,
    changed: AtomicBool,
    /// Process of each rank that attached last.
    pids: Mutex<HashMap<u32, u32>>,
}

impl Board {
    /// Of a run that is begun or continued; `before` is what its `run.json` says.
    pub fn new(before: RunInfo) -> Self {
        let mut info = RunInfo { format: FORMAT, flexmodel: env!("CARGO_PKG_VERSION").into(), ..before };
        (info.finished_ns, info.exit_code) = (None, None);
        if info.started_ns == 0 {
            info.started_ns = now_ns();
        }
        let live = Live::new(info.clone());
        Self { info: Mutex::new(info), live, changed: AtomicBool::new(true), pids: Mutex::default() }
    }

    /// The dashboard's live state.
    pub fn live(&self) -> &Arc<Live> {
        &self.live
    }

    /// Ranks of the job, as far as those say that attached.
    pub fn world(&self) -> u32 {
        self.info().world
    }

    /// Something went wrong in the agent: one line on stderr and in the run.
    pub fn trouble(&self, text: &str) {
        say::line(text);
        self.notice(text);
    }

    /// Something that the user should read once.
    pub fn notice(&self, text: &str) {
        let text = clip(text);
        let mut info = self.info();
        // Every rank says the same.
        if info.notices.len() < MAX_NOTICES && !info.notices.iter().any(|n| n == text) {
            info.notices.push(text.to_owned());
            drop(info);
            self.live.notice(text);
            self.change();
        }
    }

    /// What `flexmodel run` started.
    pub fn job(&self, command: Vec<String>, hooks: String) {
        let mut info = self.info();
        (info.command, info.hooks) = (command, hooks);
        drop(info);
        self.change();
    }

    /// Whether another job begins with this rank: it attached before from another process.
    pub fn is_another_job(&self, hello: &Hello) -> bool {
        let mut pids = self.pids.lock().unwrap_or_else(PoisonError::into_inner);
        // A process that knew its rank too late has left the one it had.
        pids.retain(|rank, pid| *pid != hello.pid || *rank == hello.rank);
        let another = pids.get(&hello.rank).is_some_and(|before| *before != hello.pid);
        if another || pids.len() >= MAX_RANKS {
            // Its other ranks are no surprise.
            pids.clear();
        }
        pids.insert(hello.rank, hello.pid);
        another
    }

    /// A rank attached.
    pub fn attached(&self, hello: &Hello) {
        let mut info = self.info();
        info.world = info.world.max(hello.world);
        let fill = |field: &mut String, value: &str| {
            if field.is_empty() {
                *field = value.to_owned();
            }
        };
        fill(&mut info.node, &hello.node);
        fill(&mut info.torch, &hello.torch);
        fill(&mut info.python, &hello.python);
        fill(&mut info.wrapper, &hello.wrapper);
        fill(&mut info.hooks, &hello.hooks);
        if info.command.is_empty() && hello.rank == 0 {
            info.command.clone_from(&hello.command);
        }
        drop(info);
        self.live.attached(hello.rank, hello.pid);
        self.change();
    }

    /// A rank is gone.
    pub fn left(&self, rank: u32) {
        self.live.left(rank);
    }

    /// A model was found on a rank. Others may have other modules of it.
    pub fn model(&self, rank: u32, model: u32, modules: Vec<ModuleInfo>) {
        self.has(rank, Some(model), modules.iter().map(|m| m.name.clone()).collect());
        let mut guard = self.info();
        let info = &mut *guard;
        let known = match info.models.iter().position(|m| m.model == model) {
            Some(at) => &mut info.models[at],
            None if info.models.len() >= MAX_MODELS => return,
            None => {
                info.models.push(ModelInfo { model, modules: Vec::new() });
                let Some(new) = info.models.last_mut() else { return };
                new
            }
        };
        let before = known.clone();
        known.add(modules);
        let (found, same) = (known.clone(), *known == before && !before.modules.is_empty());
        drop(guard);
        if !same {
            self.live.model(&found);
            self.change();
        }
    }

    /// Modules of a model that a rank has; of one without number, it captures nothing.
    pub fn has(&self, rank: u32, model: Option<u32>, modules: Vec<String>) {
        let mut guard = self.info();
        if owners::add(&mut guard.owners, rank, model, modules) {
            drop(guard);
            self.change();
        }
    }

    /// Writes `run.json` if anything changed.
    pub fn save(&self, store: &Store) {
        if !self.changed.swap(false, Ordering::AcqRel) {
            return;
        }
        let info = RunInfo { totals: store.totals(), ..self.info().clone() };
        if let Err(e) = store.dir().write_info(&info) {
            store.trouble(&e);
            self.changed.store(true, Ordering::Release);
        }
    }

    /// The run is over: its final `run.json`.
    pub fn finish(&self, store: &Store, exit_code: Option<i32>) -> RunInfo {
        let info = {
            let mut info = self.info();
            (info.totals, info.finished_ns, info.exit_code) = (store.totals(), Some(now_ns()), exit_code);
            info.clone()
        };
        if let Err(e) = store.dir().write_info(&info) {
            store.trouble(&e);
        }
        self.live.info(&info);
        info
    }

    fn change(&self) {
        self.changed.store(true, Ordering::Release);
        self.live.info(&self.info().clone());
    }

    fn info(&self) -> MutexGuard<'_, RunInfo> {
        self.info.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for Board {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Board").finish_non_exhaustive()
    }
}

fn now_ns() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64)
}
