//! What the dashboard reads: copies made under the lock, turned into JSON outside of it.

use std::{collections::BTreeSet, sync::Arc};

use flexmodel_run::format::{Identity, ModelInfo, Module, Part, Revision, RunInfo, Totals};
use serde::{Serialize, Serializer};
use wire::hooks::Kind;

use super::{Coord, Divergence, Live, Rank, Refusal, recent::Recent, series::Series};

/// The run as a whole.
#[derive(Clone, Debug, Serialize)]
pub struct RunView {
    /// When this was true.
    pub clock: u64,
    /// `waiting`, `live`, `idle` (every rank has left) or `finished`.
    pub state: &'static str,
    /// It was over before this agent began, which only shows it again.
    pub shown_again: bool,
    /// What is known of the run, without the long lists: its modules are in [`ModelsView`].
    pub info: RunInfo,
    /// Largest step seen.
    pub step: u64,
    /// Counters.
    pub totals: Totals,
    /// Ranks, in order.
    pub ranks: Vec<Rank>,
    /// What the user should read, oldest first.
    pub notices: Vec<String>,
    /// What was not captured.
    pub refusals: Vec<Refusal>,
    /// Replicas that differ.
    pub divergences: Vec<Divergence>,
    /// Hooks that began while the job ran, in the order in which this was heard of.
    pub revisions: Vec<RevisionView>,
}

/// Hooks that began while the job ran.
#[derive(Clone, Debug, Serialize)]
pub struct RevisionView {
    /// What the manifest says.
    #[serde(flatten)]
    pub revision: Revision,
    /// The same in words.
    pub words: String,
}

/// The module trees and what was captured of them.
#[derive(Clone, Debug, Serialize)]
pub struct ModelsView {
    /// When this was true.
    pub clock: u64,
    /// Trees, by model number.
    pub models: Vec<ModelView>,
    /// Every series.
    pub series: Vec<Summary>,
}

/// The tree of a model.
#[derive(Clone, Debug, Serialize)]
pub struct ModelView {
    /// Its number.
    pub model: u32,
    /// Its modules, in the model's order.
    pub modules: Vec<ModuleView>,
}

/// A module.
#[derive(Clone, Debug, Serialize)]
pub struct ModuleView {
    /// Canonical name.
    pub name: Arc<str>,
    /// Class.
    pub class: Arc<str>,
    /// What of it is tapped: a mask, in JSON a list of words.
    #[serde(serialize_with = "words")]
    pub kinds: u32,
}

/// A series without its points.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// Its number in this run of the agent.
    pub id: usize,
    /// Job.
    pub job: u32,
    /// Attempt of it.
    pub attempt: u32,
    /// Model number.
    pub model: u32,
    /// Canonical module name.
    pub module: Arc<str>,
    /// Kind's word.
    pub kind: &'static str,
    /// Leaf.
    pub path: Arc<str>,
    /// Training mode.
    pub train: bool,
    /// Class of the module.
    pub class: Arc<str>,
    /// Hook group.
    pub group: Arc<str>,
    /// Element type.
    pub dtype: &'static str,
    /// What changes.
    #[serde(flatten)]
    pub state: SeriesState,
}

/// What changes of a series.
#[derive(Clone, Debug, Serialize)]
pub struct SeriesState {
    /// Records so far.
    pub count: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Records with not-a-number or infinite elements.
    pub bad: u64,
    /// The newest record: step, mean, std, l2, absmax.
    pub last: Option<(u64, [Option<f64>; 4])>,
}

/// A series with its points, column by column.
#[derive(Clone, Debug, Serialize)]
pub struct SeriesView {
    /// What it is.
    #[serde(flatten)]
    pub summary: Summary,
    /// The points.
    pub points: Columns,
}

/// Points, column by column. `null`: not known.
#[derive(Clone, Debug, Default, Serialize)]
#[allow(missing_docs)]
pub struct Columns {
    pub step: Vec<u64>,
    pub micro: Vec<u32>,
    pub call: Vec<u32>,
    pub repeat: Vec<u32>,
    pub apart: Vec<Option<u32>>,
    pub mean: Vec<Option<f64>>,
    pub std: Vec<Option<f64>>,
    pub l2: Vec<Option<f64>>,
    pub absmax: Vec<Option<f64>>,
    pub bad: Vec<u64>,
    /// Every part that the layout promises is there.
    pub complete: Vec<bool>,
}

/// Which series, and which of their points.
#[derive(Clone, Debug, Default)]
pub struct SeriesQuery {
    /// Model number.
    pub model: u32,
    /// Canonical module name.
    pub module: String,
    /// Only this kind.
    pub kind: Option<Kind>,
    /// Only this leaf.
    pub path: Option<String>,
    /// Only this mode.
    pub train: Option<bool>,
    /// Only points that changed after this clock.
    pub since: u64,
}

/// What changed since a clock.
#[derive(Clone, Debug, Serialize)]
pub struct Delta {
    /// Ask from here next time.
    pub clock: u64,
    /// As in [`RunView`].
    pub state: &'static str,
    /// As in [`RunView`].
    pub shown_again: bool,
    /// The command's exit code, once it is known.
    pub exit_code: Option<i32>,
    /// Largest step seen.
    pub step: u64,
    /// Counters.
    pub totals: Totals,
    /// The run's facts, ranks, notices, refusals or divergences changed.
    pub run: bool,
    /// The module trees changed, or there is a new series.
    pub models: bool,
    /// Series that changed, by number.
    pub series: Vec<(usize, SeriesState)>,
}

/// A record among the newest.
#[derive(Clone, Debug)]
pub struct Picked {
    /// What it is.
    pub id: Identity,
    /// Its parts, so far, and where they lie.
    pub parts: Vec<Part>,
    /// The ranks that made its pass, where not all did.
    pub only: Option<BTreeSet<u32>>,
}

impl Live {
    /// The run as a whole.
    pub fn run(&self) -> RunView {
        let inner = self.lock();
        RunView {
            clock: inner.clock,
            state: inner.state(),
            shown_again: inner.ended.is_some(),
            info: RunInfo { owners: Vec::new(), ..inner.info.clone() },
            step: inner.step,
            totals: inner.totals,
            ranks: inner.ranks.values().cloned().collect(),
            notices: inner.notices.iter().cloned().collect(),
            refusals: inner.refusals.iter().cloned().collect(),
            divergences: inner.divergences.iter().cloned().collect(),
            revisions: inner.revisions.iter().map(RevisionView::of).collect(),
        }
    }

    /// The revision of the hooks that a record is of, where there is more to say of it than that they never changed.
    pub fn revision_of(&self, parts: &[Part]) -> Option<u64> {
        let lowest = parts.iter().map(|part| part.what.revision).min().unwrap_or_default();
        (lowest > 0 || !self.lock().revisions.is_empty()).then_some(lowest)
    }

    /// The module trees and what was captured of them.
    pub fn models(&self) -> ModelsView {
        let inner = self.lock();
        ModelsView {
            clock: inner.clock,
            models: inner.models.values().map(ModelView::of).collect(),
            series: inner.series.iter().enumerate().map(|(id, s)| summary(id, s)).collect(),
        }
    }

    /// The series that a query means, and the clock to ask from next time.
    pub fn series(&self, query: &SeriesQuery) -> (u64, Vec<SeriesView>) {
        let inner = self.lock();
        let found = inner.series.iter().enumerate().filter(|(_, s)| query.wants(s));
        let views = found.map(|(id, s)| SeriesView { summary: summary(id, s), points: columns(s, query.since) });
        (inner.clock, views.collect())
    }

    /// What changed since `since`, at most `limit` series of it: those that waited longest.
    pub fn delta(&self, since: u64, seen_series: &mut usize, limit: usize) -> Delta {
        let inner = self.lock();
        let mut changed: Vec<(usize, u64)> =
            inner.series.iter().enumerate().map(|(id, s)| (id, s.changed)).filter(|(_, c)| *c > since).collect();
        let mut clock = inner.clock;
        if changed.len() > limit {
            changed.sort_unstable_by_key(|(_, c)| *c);
            changed.truncate(limit);
            clock = changed.last().map_or(clock, |(_, c)| *c);
        }
        let models = inner.models_clock > since || inner.series.len() != *seen_series;
        *seen_series = inner.series.len();
        Delta {
            clock,
            state: inner.state(),
            shown_again: inner.ended.is_some(),
            exit_code: inner.info.exit_code,
            step: inner.step,
            totals: inner.totals,
            run: inner.run_clock > since,
            models,
            series: changed.into_iter().map(|(id, _)| (id, state(&inner.series[id]))).collect(),
        }
    }

    /// The newest records that a query means, newest first.
    pub fn records(&self, query: &SeriesQuery, limit: usize) -> Vec<Picked> {
        let inner = self.lock();
        let recent = inner.recent.newest().map(|r| (r, &inner.series[r.series as usize]));
        let found = recent.filter(|(_, series)| query.wants(series)).take(limit);
        found.map(|(r, series)| Picked::of(r, series)).collect()
    }

    /// The parts of a record, if it is among the newest.
    pub fn pick(&self, id: &Identity) -> Option<Picked> {
        let inner = self.lock();
        let (index, at) = (inner.find(id)?, Coord::of(id));
        let series = &inner.series[index as usize];
        let point = series.points.get(series.points.partition_point(|p| p.at < at)).filter(|p| p.at == at)?;
        let recent = inner.recent.get(point.number).filter(|r| r.series == index && r.coord == at)?;
        Some(Picked::of(recent, series))
    }
}

impl RevisionView {
    fn of(revision: &Revision) -> Self {
        Self { revision: revision.clone(), words: revision.to_string() }
    }
}

impl Picked {
    fn of(recent: &Recent, series: &Series) -> Self {
        Self { id: recent.identity(series), parts: recent.parts(series), only: recent.only.clone() }
    }
}

impl SeriesQuery {
    fn wants(&self, series: &Series) -> bool {
        let key = &series.key;
        key.model == self.model
            && *key.module == *self.module
            && self.kind.is_none_or(|k| key.kind == k)
            && self.path.as_ref().is_none_or(|p| *key.path == **p)
            && self.train.is_none_or(|t| key.train == t)
    }
}

impl super::Inner {
    fn state(&self) -> &'static str {
        if self.info.finished_ns.is_some() {
            "finished"
        } else if self.ranks.is_empty() {
            "waiting"
        } else if self.ranks.values().any(|r| r.attached) {
            "live"
        } else {
            "idle"
        }
    }
}

impl ModelView {
    fn of(model: &ModelInfo) -> Self {
        let module = |m: &Module| ModuleView { name: m.name.clone(), class: m.class.clone(), kinds: m.kinds };
        Self { model: model.model, modules: model.modules.iter().map(module).collect() }
    }
}

fn words<S: Serializer>(mask: &u32, to: S) -> Result<S::Ok, S::Error> {
    to.collect_seq(Kind::ALL.into_iter().filter(|kind| mask & kind.bit() != 0).map(Kind::name))
}

fn summary(id: usize, s: &Series) -> Summary {
    Summary {
        id,
        job: s.key.job.job,
        attempt: s.key.job.attempt,
        model: s.key.model,
        module: s.key.module.clone(),
        kind: s.key.kind.name(),
        path: s.key.path.clone(),
        train: s.key.train,
        class: s.key.class.clone(),
        group: s.key.group.clone(),
        dtype: s.dtype.name(),
        state: state(s),
    }
}

fn state(s: &Series) -> SeriesState {
    let last = s.points.back().map(|p| (p.at.step, p.moments.values()));
    SeriesState { count: s.count, bytes: s.bytes, bad: s.bad, last }
}

fn columns(s: &Series, since: u64) -> Columns {
    let mut out = Columns::default();
    for p in s.points.iter().filter(|p| p.changed > since) {
        let Coord { step, micro, call, repeat, apart } = p.at;
        out.step.push(step);
        out.micro.push(micro);
        out.call.push(call);
        out.repeat.push(repeat);
        out.apart.push(apart);
        let [mean, std, l2, absmax] = p.moments.values();
        out.mean.push(mean);
        out.std.push(std);
        out.l2.push(l2);
        out.absmax.push(absmax);
        out.bad.push(p.moments.bad);
        out.complete.push(p.pieces >= p.promised);
    }
    out
}
