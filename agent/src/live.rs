//! What the dashboard shows of a run, fed by the ingest threads and, where a run is opened again, by its manifest.
//!
//! Feeding is one short lock, a hash lookup and a push; only [`Live::replay`] does I/O. Memory is bounded whatever the
//! job does:
//!
//! | what | bound |
//! |---|---|
//! | points | [`POINTS_PER_SERIES`] a series, [`POINT_BUDGET`] in all (104 bytes each): at most 28 MB |
//! | series | [`MAX_SERIES`], [`MAX_SERIES_TEXT`] of names; later ones are in the totals but not charted, as a notice says |
//! | newest records | [`MAX_RECORDS`] with at most [`MAX_PARTS`] parts between them, [`MAX_PART_BYTES`] in all |
//! | modules | what `run.json` lists, shared with it: [`names`](flexmodel_run::names), [`owners`](flexmodel_run::ownership) |
//! | notices, divergences, refusals | the last [`MAX_NOTICES`], [`MAX_NOTICES`] and [`MAX_REFUSALS`] |
//! | revisions of hooks | the last [`MAX_REVISIONS`] with at most [`MAX_REVISION_TEXT`] of clauses between them |
//! | ranks, models | [`MAX_RANKS`], [`MAX_MODELS`] |

mod recent;
mod replay;
mod series;
mod view;
mod watch;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
};

use flexmodel_run::{
    format::{Identity, ModelInfo, Part, Revision, RunInfo, Totals, What},
    joining::Told,
    names::Names,
    ownership::PartialOwnership,
};
use tokio::sync::Notify;
use wire::control::MAX_MODELS;

pub use series::Coord;
use series::{Key, Series, Slot};
pub use view::{Picked, RunView, SeriesQuery};
pub use watch::Watch;

/// Most points kept of one series; the newest stay.
pub const POINTS_PER_SERIES: usize = 2048;
/// Most points kept of all series. When there are many series, each keeps fewer.
pub const POINT_BUDGET: usize = 1 << 18;
/// Most series: (model, module, kind, path, training mode).
pub const MAX_SERIES: usize = 1 << 13;
/// Most bytes of different names of series: modules, classes, groups, leaves.
pub const MAX_SERIES_TEXT: usize = 4 << 20;
/// Newest records kept, with where their parts lie.
pub const MAX_RECORDS: usize = 4096;
/// Most parts that those records hold between them.
pub const MAX_PARTS: usize = 1 << 15;
/// Most memory of these parts. One of usual shape and layout takes about 540 bytes.
pub const MAX_PART_BYTES: usize = 20 << 20;
/// Notices, and divergences, kept.
pub const MAX_NOTICES: usize = 100;
/// Reasons of refusal kept, with their counts.
pub const MAX_REFUSALS: usize = 100;
/// Revisions of hooks kept.
pub const MAX_REVISIONS: usize = 100;
/// Bytes of their clauses.
pub const MAX_REVISION_TEXT: usize = 256 << 10;
/// Ranks kept apart.
pub const MAX_RANKS: usize = 1 << 16;

/// The live state of one run. Shared by the ingest threads, which feed it, and the dashboard, which reads it.
pub struct Live {
    inner: Mutex<Inner>,
    /// Grows with every change, so that a reader can tell without the lock that there is nothing new.
    clock: AtomicU64,
    /// Wakes the event streams at once for what cannot wait: the end of the run.
    urgent: Notify,
    /// Pages that watch and have not heard of the end.
    watching: AtomicUsize,
}

/// A rank, as far as the agent knows it.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct Rank {
    /// Global rank.
    pub rank: u32,
    /// Its process.
    pub pid: u32,
    /// It is connected now.
    pub attached: bool,
    /// Parts it delivered.
    pub parts: u64,
    /// Bytes of those.
    pub bytes: u64,
    /// Parts it lost.
    pub dropped: u64,
    /// Step of its last part.
    pub step: u64,
}

/// Why tensors of one leaf were not captured.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Refusal {
    /// Canonical module name.
    pub module: String,
    /// Kind's word.
    pub kind: &'static str,
    /// Leaf.
    pub path: String,
    /// Why.
    pub reason: String,
    /// How often.
    pub count: u64,
}

/// Replicas that differ.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Divergence {
    /// The record's name.
    pub record: String,
    /// The rank whose copy differs.
    pub rank: u32,
    /// The rank it was compared with.
    pub against: u32,
}

/// The end of a run.
#[derive(Clone, Copy)]
struct Ended {
    finished_ns: u64,
    exit_code: Option<i32>,
}

struct Inner {
    info: RunInfo,
    models: BTreeMap<u32, ModelInfo>,
    series: Vec<Series>,
    /// Places in `series`, by module: a module has few.
    by_module: HashMap<Arc<str>, Vec<u32>>,
    /// Those of the series.
    names: Names,
    recent: recent::Ring,
    ranks: BTreeMap<u32, Rank>,
    notices: VecDeque<String>,
    refusals: VecDeque<Refusal>,
    divergences: VecDeque<Divergence>,
    revisions: VecDeque<Revision>,
    totals: Totals,
    step: u64,
    /// How the run ended, while it is only shown again.
    ended: Option<Ended>,
    /// Series that were left out because there are too many: said once.
    overflowed: bool,
    clock: u64,
    /// `clock` when anything but a series last changed.
    run_clock: u64,
    /// `clock` when the module trees last changed.
    models_clock: u64,
}

impl Live {
    /// The state of a run about to begin, or taken up again: totals go on from those of `info`.
    pub fn new(info: RunInfo) -> Arc<Self> {
        let mut inner = Inner::new(info.totals);
        for notice in &info.notices {
            inner.notice(notice);
        }
        inner.take_info(info);
        let clock = AtomicU64::new(inner.clock);
        Arc::new(Self { clock, inner: Mutex::new(inner), urgent: Notify::new(), watching: AtomicUsize::new(0) })
    }

    /// A part was stored, and it is known of which pass it is; or a replica differs.
    pub fn told(&self, told: &Told) {
        self.change(|inner| match told {
            Told::Part { part, only } => inner.part(part, only.as_ref()),
            Told::Differs { what, against } => inner.diverged(what, *against),
        });
    }

    /// The counters of the store.
    pub fn counted(&self, totals: Totals) {
        if self.lock().totals != totals {
            self.change(|inner| inner.totals = totals);
        }
    }

    /// A tensor was not captured.
    pub fn refused(&self, what: &What, reason: &str) {
        self.change(|inner| inner.refused(what, reason));
    }

    /// A rank lost parts.
    pub fn dropped(&self, rank: u32, count: u64) {
        self.change(|inner| inner.dropped(rank, count));
    }

    /// Other hooks began in a job.
    pub fn revision(&self, revision: &Revision) {
        self.change(|inner| inner.revision(revision));
    }

    /// A model was found, or found to be larger than was known.
    pub fn model(&self, model: &ModelInfo) {
        self.change(|inner| inner.model(model));
    }

    /// Which ranks lack the module of a record.
    pub fn partial(&self, id: &Identity) -> PartialOwnership {
        let inner = self.lock();
        let (owners, world) = (inner.info.owners.clone(), inner.info.world);
        drop(inner);
        PartialOwnership::of_module(id.job, &owners, world, id.model, &id.module)
    }

    /// A rank connected. A run that was over goes on.
    pub fn attached(&self, rank: u32, pid: u32) {
        self.change(|inner| {
            if inner.ended.take().is_some() {
                (inner.info.finished_ns, inner.info.exit_code) = (None, None);
            }
            if let Some(r) = inner.rank(rank) {
                r.pid = pid;
                r.attached = true;
            }
            inner.run_changed();
        });
    }

    /// A rank disconnected, in good order or not.
    pub fn left(&self, rank: u32) {
        self.change(|inner| {
            if let Some(r) = inner.rank(rank) {
                r.attached = false;
            }
            inner.run_changed();
        });
    }

    /// Something the user should read once.
    pub fn notice(&self, text: &str) {
        self.change(|inner| inner.notice(text));
    }

    /// What is known of the run changed; once `finished_ns` is set, its totals count.
    ///
    /// The agent ends soon after that: where pages are open, this waits until they have heard of the end and had a
    /// moment to ask for the last points, at most 1.5 seconds in all. Not for a thread that serves them.
    pub fn info(&self, info: &RunInfo) {
        let finished = info.finished_ns.is_some();
        self.change(|inner| {
            if finished {
                inner.totals = info.totals;
            }
            inner.take_info(info.clone());
        });
        if finished {
            self.urgent.notify_waiters();
            self.farewell();
        }
    }

    /// Grows with every change.
    pub fn clock(&self) -> u64 {
        self.clock.load(Ordering::Acquire)
    }

    /// Waits for something that cannot wait for the next tick.
    pub async fn urgent(&self) {
        self.urgent.notified().await;
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Every change leaves the state readable at each of its steps, so a panicked feeder does not spoil it.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, f: impl FnOnce(&mut Inner)) {
        let mut inner = self.lock();
        inner.clock += 1;
        f(&mut inner);
        self.clock.store(inner.clock, Ordering::Release);
    }
}

impl Inner {
    fn new(totals: Totals) -> Self {
        Self {
            info: RunInfo::default(),
            models: BTreeMap::new(),
            series: Vec::new(),
            by_module: HashMap::new(),
            names: Names::new(4 * MAX_SERIES, MAX_SERIES_TEXT),
            recent: recent::Ring::default(),
            ranks: BTreeMap::new(),
            notices: VecDeque::new(),
            refusals: VecDeque::new(),
            divergences: VecDeque::new(),
            revisions: VecDeque::new(),
            totals,
            step: 0,
            ended: None,
            overflowed: false,
            clock: 0,
            run_clock: 0,
            models_clock: 0,
        }
    }

    fn run_changed(&mut self) {
        self.run_clock = self.clock;
    }

    fn rank(&mut self, rank: u32) -> Option<&mut Rank> {
        if self.ranks.len() >= MAX_RANKS && !self.ranks.contains_key(&rank) {
            return None;
        }
        Some(self.ranks.entry(rank).or_insert_with(|| Rank { rank, ..Rank::default() }))
    }

    fn notice(&mut self, text: &str) {
        if self.notices.back().is_none_or(|last| last != text) {
            push_bounded(&mut self.notices, text.to_owned(), MAX_NOTICES);
        }
        self.run_changed();
    }

    fn take_info(&mut self, mut info: RunInfo) {
        for model in std::mem::take(&mut info.models) {
            self.model(&model);
        }
        // The notices of `info` came one by one, and would be shown twice.
        info.notices.clear();
        if let Some(Ended { finished_ns, exit_code }) = self.ended {
            (info.finished_ns, info.exit_code) = (Some(finished_ns), exit_code);
        }
        self.info = info;
        self.run_changed();
    }

    fn model(&mut self, model: &ModelInfo) {
        let known = self.models.get(&model.model);
        if known == Some(model) || (known.is_none() && self.models.len() >= MAX_MODELS) {
            return;
        }
        self.models.insert(model.model, model.clone());
        self.models_clock = self.clock;
        self.run_changed();
    }

    fn refused(&mut self, what: &What, reason: &str) {
        self.totals.refused = self.totals.refused.saturating_add(1);
        self.run_changed();
        let (id, kind) = (&what.id, what.id.kind.name());
        let same =
            |r: &&mut Refusal| r.module == id.module && r.kind == kind && r.path == id.path && r.reason == reason;
        match self.refusals.iter_mut().find(same) {
            Some(refusal) => refusal.count += 1,
            None => {
                let (module, path, reason) = (id.module.clone(), id.path.clone(), reason.to_owned());
                push_bounded(&mut self.refusals, Refusal { module, kind, path, reason, count: 1 }, MAX_REFUSALS);
            }
        }
    }

    fn dropped(&mut self, rank: u32, count: u64) {
        self.totals.dropped = self.totals.dropped.saturating_add(count);
        if let Some(r) = self.rank(rank) {
            r.dropped = r.dropped.saturating_add(count);
        }
        self.run_changed();
    }

    fn diverged(&mut self, what: &What, against: u32) {
        let divergence = Divergence { record: what.id.to_string(), rank: what.rank, against };
        self.totals.divergences = self.totals.divergences.saturating_add(1);
        push_bounded(&mut self.divergences, divergence, MAX_NOTICES);
        self.run_changed();
    }

    fn revision(&mut self, revision: &Revision) {
        let same = |known: &Revision| (known.job, known.revision) == (revision.job, revision.revision);
        self.revisions.retain(|known| !same(known));
        push_bounded(&mut self.revisions, revision.clone(), MAX_REVISIONS);
        let text = |one: &Revision| one.clauses.iter().map(|clause| clause.text.len()).sum::<usize>();
        let mut all: usize = self.revisions.iter().map(text).sum();
        while all > MAX_REVISION_TEXT && self.revisions.len() > 1 {
            all -= self.revisions.pop_front().as_ref().map_or(0, text);
        }
        self.run_changed();
    }

    fn part(&mut self, part: &Part, only: Option<&BTreeSet<u32>>) {
        let (what, id) = (&part.what, &part.what.id);
        let bytes = part.at.as_ref().map_or(0, |at| at.len);
        self.totals.parts += 1;
        self.totals.bytes = self.totals.bytes.saturating_add(bytes);
        self.step = self.step.max(id.step);
        if let Some(r) = self.rank(what.rank) {
            r.parts += 1;
            r.bytes = r.bytes.saturating_add(bytes);
            r.step = id.step;
        }
        let Some(index) = self.series_of(what) else {
            self.totals.records += u64::from(what.axes.iter().all(|a| a.index == 0));
            return;
        };
        let (number, clock, limit) = (self.recent.next(), self.clock, self.limit());
        let series = &mut self.series[index as usize];
        series.bytes = series.bytes.saturating_add(bytes);
        match series.add(part, only, number, clock, limit) {
            Slot::New => {
                self.totals.records += 1;
                self.recent.begin(index, part, only);
            }
            Slot::Known(number) => self.recent.join(number, part),
            Slot::TooOld => {}
        }
    }

    /// Points each series may keep now.
    fn limit(&self) -> usize {
        (POINT_BUDGET / self.series.len().max(1).next_power_of_two()).min(POINTS_PER_SERIES)
    }

    /// The series of a part, made if it is new; `None` if there are too many.
    fn series_of(&mut self, what: &What) -> Option<u32> {
        if let Some(index) = self.find(&what.id) {
            return Some(index);
        }
        let key = if self.series.len() < MAX_SERIES { Key::new(what, &mut self.names) } else { None };
        let Some(key) = key else {
            if !self.overflowed {
                self.overflowed = true;
                self.notice(&format!(
                    "more than {MAX_SERIES} tensors are tapped, or with longer names than fit: the dashboard charts the first \
                     ones; all are kept"
                ));
            }
            return None;
        };
        let before = self.limit();
        let index = self.series.len() as u32;
        self.by_module.entry(key.module.clone()).or_default().push(index);
        self.series.push(Series::new(key, what.dtype));
        let limit = self.limit();
        if limit < before {
            self.series.iter_mut().for_each(|s| s.shrink(limit));
        }
        Some(index)
    }

    /// The series of an identity, if it is charted.
    fn find(&self, id: &Identity) -> Option<u32> {
        let places = self.by_module.get(id.module.as_str())?;
        places.iter().copied().find(|&i| self.series[i as usize].key.is_of(id))
    }
}

fn push_bounded<T>(queue: &mut VecDeque<T>, item: T, limit: usize) {
    if queue.len() >= limit {
        queue.pop_front();
    }
    queue.push_back(item);
}

#[cfg(test)]
mod tests;
