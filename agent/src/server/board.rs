//! What people see of the run: `run.json`, notices, and the dashboard's live state.

use std::{
    collections::BTreeSet,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{SystemTime, UNIX_EPOCH},
};

use flexmodel_run::{
    format::{FORMAT, JobId, ModelInfo, Module, Owners, RunInfo},
    names::{MAX_NAME_BYTES, MAX_NAMES, Names},
    ownership::{self, MAX_MODULES},
    write::Store,
};
use wire::{
    control::{Hello, MAX_MODELS, MAX_NOTICE, MAX_NOTICES, ModuleInfo, StepRule, clip, too_many_models},
    hooks::{Hook, Kind, Selector, nearest},
};

use super::listed::Listed;
use crate::{live::Live, say, secrets};

/// Most bytes of the command, and of the hooks, that are kept.
const MAX_TEXT: usize = 128 << 10;

/// Collects what is known of the run.
pub struct Board {
    info: Mutex<Known>,
    live: Arc<Live>,
    changed: AtomicBool,
}

/// What is known of the run, and the names in it.
struct Known {
    info: RunInfo,
    names: Names,
    /// There were more owners than are listed: none are from now on.
    without_owners: bool,
}

impl Board {
    /// Of a run that is begun or continued; `before` is what its `run.json` says.
    pub fn new(before: RunInfo) -> Self {
        let mut info = RunInfo { format: FORMAT, flexmodel: env!("CARGO_PKG_VERSION").into(), ..before };
        info.command = short(secrets::hidden(&info.command), MAX_TEXT);
        (info.finished_ns, info.exit_code) = (None, None);
        if info.started_ns == 0 {
            info.started_ns = now_ns();
        }
        let mut names = Names::new(MAX_NAMES, MAX_NAME_BYTES);
        let without_owners = !within(&mut info, &mut names);
        let live = Live::new(info.clone());
        Self { info: Mutex::new(Known { info, names, without_owners }), live, changed: AtomicBool::new(true) }
    }

    /// The dashboard's live state.
    pub fn live(&self) -> &Arc<Live> {
        &self.live
    }

    /// The run is over, as `before` says, and is only shown again until a rank attaches.
    pub fn show_again(&self, before: &RunInfo) {
        // What is shown of the rest is within the bounds of this agent.
        let (finished_ns, exit_code) = (before.finished_ns, before.exit_code);
        let info = RunInfo { finished_ns, exit_code, ..self.known().info.clone() };
        self.live.show_again(&info);
    }

    /// Ranks of the job, as far as those say that attached.
    pub fn world(&self) -> u32 {
        self.known().info.world
    }

    /// Something went wrong in the agent: one line on stderr and in the run.
    pub fn trouble(&self, text: &str) {
        say::line(text);
        self.notice(text);
    }

    /// The same, of what whoever connects may bring about as often as he likes: once, on stderr too.
    pub fn trouble_once(&self, text: &str) {
        if self.notice(text) {
            eprintln!("flexmodel: {text}");
        }
    }

    /// Something that the user should read once; whether it was said now.
    pub fn notice(&self, text: &str) -> bool {
        let text = clip(text);
        let mut known = self.known();
        let info = &mut known.info;
        // Every rank says the same.
        let new = info.notices.len() < MAX_NOTICES && !info.notices.iter().any(|n| n == text);
        if new {
            info.notices.push(text.to_owned());
            drop(known);
            self.live.notice(text);
            self.change();
        }
        new
    }

    /// A rank counts steps by this rule.
    pub fn steps(&self, rule: StepRule) {
        let mut known = self.known();
        let rules = &mut known.info.steps;
        if rules.contains(&rule) {
            return;
        }
        rules.push(rule);
        let mixed = rules.len() == 2;
        drop(known);
        self.change();
        if mixed {
            self.notice("this job changes the rule by which steps are counted: see \"steps\" in run.json");
        }
    }

    /// What `flexmodel run` started.
    pub fn job(&self, command: Vec<String>, hooks: String) {
        let mut known = self.known();
        known.info.command = short(secrets::hidden(&command), MAX_TEXT);
        known.info.hooks = start_of(&hooks, MAX_TEXT).to_owned();
        drop(known);
        self.change();
    }

    /// A rank attached.
    pub fn attached(&self, hello: &Hello) {
        let mut known = self.known();
        let info = &mut known.info;
        info.world = info.world.max(hello.world);
        let fill = |field: &mut String, value: &str, most: usize| {
            if field.is_empty() {
                *field = start_of(value, most).to_owned();
            }
        };
        fill(&mut info.node, &hello.node, MAX_NOTICE);
        fill(&mut info.torch, &hello.torch, MAX_NOTICE);
        fill(&mut info.python, &hello.python, MAX_NOTICE);
        fill(&mut info.wrapper, &hello.wrapper, MAX_NOTICE);
        fill(&mut info.hooks, &hello.hooks, MAX_TEXT);
        if info.command.is_empty() && hello.rank == 0 {
            info.command = short(secrets::hidden(&hello.command), MAX_TEXT);
        }
        drop(known);
        self.live.attached(hello.rank, hello.pid);
        self.change();
    }

    /// A rank is gone.
    pub fn left(&self, rank: u32) {
        self.live.left(rank);
    }

    /// A model was found on a rank. Others may have other modules of it.
    pub fn model(&self, job: JobId, rank: u32, model: u32, listed: &Listed<ModuleInfo>) {
        let mut guard = self.known();
        let Known { info, names, .. } = &mut *guard;
        let at = info.models.iter().position(|m| m.model == model);
        if at.is_none() && info.models.len() >= MAX_MODELS {
            drop(guard);
            self.notice(&too_many_models());
            return;
        }
        let at = at.unwrap_or_else(|| {
            info.models.push(ModelInfo { model, ..ModelInfo::default() });
            info.models.len() - 1
        });
        let keep = |(name, class, kinds): (&str, &str, u32)| {
            Some(Module { name: names.keep(name)?, class: names.keep(class).unwrap_or_default(), kinds })
        };
        let modules: Vec<Module> = listed.iter().filter_map(keep).collect();
        let mut left_out = modules.len() < listed.sent();
        let owned: Vec<Arc<str>> = modules.iter().map(|module| module.name.clone()).collect();
        let room = MAX_MODULES.saturating_sub(info.models.iter().map(|m| m.modules.len()).sum());
        let known = &mut info.models[at];
        let before = known.modules.clone();
        if *before != modules {
            left_out |= known.add(modules, room) > 0;
        }
        let found = (before.is_empty() || before != known.modules).then(|| known.clone());
        let owners_changed = guard.owned(job, rank, Some(model), &owned, listed.is_cut());
        drop(guard);
        if let Some(found) = &found {
            self.live.model(found);
        }
        if found.is_some() || owners_changed == Ok(true) {
            self.change();
        }
        self.tell(left_out, owners_changed.is_err());
    }

    /// Modules of a model that a rank has and captures nothing of.
    pub fn others(&self, job: JobId, rank: u32, listed: &Listed<String>) {
        let mut known = self.known();
        let owned: Vec<Arc<str>> = listed.iter().filter_map(|(name, ..)| known.names.keep(name)).collect();
        let left_out = owned.len() < listed.sent();
        let changed = known.owned(job, rank, None, &owned, listed.is_cut());
        drop(known);
        if changed == Ok(true) {
            self.change();
        }
        self.tell(left_out, changed.is_err());
    }

    /// Clauses by name that match none of a job's modules, as far as these are known, each with what may be meant.
    pub fn unmatched(&self, job: JobId, clauses: &[Hook]) -> Vec<String> {
        let known = self.known();
        let groups = known.info.owners.iter().filter(|group| group.job == job);
        let names: BTreeSet<&str> = groups.flat_map(|group| group.modules.iter()).map(|name| &**name).collect();
        // Of parameters and classes the agent does not know all names.
        let is_by_name = |clause: &&Hook| {
            !matches!(clause.selector, Selector::Class(_)) && clause.kind_mask() & !Kind::OF_PARAMETERS != 0
        };
        let lost = clauses.iter().filter(is_by_name).filter(|_| !names.is_empty());
        lost.filter(|clause| !names.iter().any(|name| clause.selector.matches(name, "", "")))
            .map(|clause| {
                let near = nearest(&clause.selector, names.iter().map(|name| (*name, "")), 3);
                let hint = if near.is_empty() { String::new() } else { format!("; nearest: {}", near.join(", ")) };
                format!("'{}' matches none of the modules that this agent knows of{hint}", clause.selector)
            })
            .collect()
    }

    /// Says once what is not listed.
    fn tell(&self, modules: bool, owners: bool) {
        if modules {
            self.notice(&format!(
                "there are more modules than {MAX_NAMES} names or {} MiB of them: run.json and the page leave further \
                 ones out; what is captured of them is stored",
                MAX_NAME_BYTES >> 20
            ));
        }
        if owners {
            self.change();
            self.notice(
                "the lists of which rank has which modules got too long for run.json and are left out: what some ranks \
                 alone have may not be known to be whole; it is stored",
            );
        }
    }

    /// Writes `run.json` if anything changed.
    pub fn save(&self, store: &Store) {
        if !self.changed.swap(false, Ordering::AcqRel) {
            return;
        }
        // Long lists are shared with the copy. The lock is not held while a disk takes its time.
        let info = RunInfo { totals: store.totals(), ..self.known().info.clone() };
        if let Err(e) = store.dir().write_info(&info) {
            store.trouble(&e);
            self.changed.store(true, Ordering::Release);
        }
    }

    /// The run is over: its final `run.json`.
    pub fn finish(&self, store: &Store, exit_code: Option<i32>) -> RunInfo {
        let info = {
            let mut known = self.known();
            let info = &mut known.info;
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
        let info = self.known().info.clone();
        self.live.info(&info);
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.info.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Known {
    /// A rank has these modules; whether that is news. `cut`: it has more. (What is missing because there are too many
    /// names is missing for all ranks.)
    fn owned(
        &mut self,
        job: JobId,
        rank: u32,
        model: Option<u32>,
        modules: &[Arc<str>],
        cut: bool,
    ) -> Result<bool, ownership::TooMany> {
        if self.without_owners {
            return Ok(false);
        }
        let owners = &mut self.info.owners;
        let added = if cut { Err(ownership::TooMany) } else { ownership::add(owners, job, rank, model, modules) };
        if added.is_err() {
            (self.info.owners, self.without_owners) = (Vec::new(), true);
        }
        added
    }
}

/// Brings what a run has so far within bounds, with each name once; `false`: its owners had to go.
fn within(info: &mut RunInfo, names: &mut Names) -> bool {
    info.models.truncate(MAX_MODELS);
    let mut room = MAX_MODULES;
    for model in &mut info.models {
        let keep = |m: &Module| {
            let (name, class) = (names.keep(&m.name)?, names.keep(&m.class).unwrap_or_default());
            Some(Module { name, class, kinds: m.kinds })
        };
        model.modules = Arc::new(model.modules.iter().filter_map(keep).take(room).collect());
        room -= model.modules.len();
    }
    for Owners { job, model, ranks, modules } in std::mem::take(&mut info.owners) {
        let kept: Vec<Arc<str>> = modules.iter().filter_map(|name| names.keep(name)).collect();
        let added = |rank| ownership::add(&mut info.owners, job, rank, model, &kept);
        if ranks.into_iter().map(added).any(|added| added.is_err()) {
            info.owners.clear();
            return false;
        }
    }
    true
}

/// A command line as far as it is kept: about `most` bytes of it.
pub(super) fn short(command: Vec<String>, most: usize) -> Vec<String> {
    let (mut out, mut room, count) = (Vec::new(), most, command.len());
    for (at, word) in command.into_iter().enumerate() {
        if word.len() + size_of::<String>() > room {
            out.push(format!("... ({} more arguments)", count - at));
            break;
        }
        room -= word.len() + size_of::<String>();
        out.push(word);
    }
    out
}

/// The start of a text, `most` bytes of it at most.
pub(super) fn start_of(text: &str, most: usize) -> &str {
    &text[..text.floor_char_boundary(most)]
}

impl std::fmt::Debug for Board {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Board").finish_non_exhaustive()
    }
}

pub(super) fn now_ns() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn modules(from: usize, count: usize) -> Listed<ModuleInfo> {
        let module = |n: usize| ModuleInfo { name: format!("m.{n}"), class: "C".into(), kinds: 1 };
        (from..from + count).map(module).collect()
    }

    #[test]
    fn a_run_that_is_continued_is_brought_within_bounds() {
        let module = |n: usize| Module { name: format!("m.{n}").into(), class: "C".into(), kinds: 1 };
        let modules = Arc::new((0..MAX_NAMES).map(module).collect::<Vec<_>>());
        let names = Arc::new(modules.iter().map(|m| m.name.clone()).collect());
        let models = (0..1100).map(|model| ModelInfo { model, modules: modules.clone() }).collect();
        let owners = (0..9).map(|rank| Owners {
            job: JobId::default(),
            model: Some(rank),
            ranks: vec![rank],
            modules: Arc::clone(&names),
        });
        let board = Board::new(RunInfo { models, owners: owners.collect(), ..RunInfo::default() });
        let known = board.known();
        assert_eq!((known.info.models.len(), known.info.owners.len(), known.without_owners), (MAX_MODELS, 0, true));
        assert_eq!(known.info.models.iter().map(|m| m.modules.len()).sum::<usize>(), MAX_MODULES);
    }

    /// Readers take a rank that has not told of a module for one that lacks it.
    #[test]
    fn a_rank_that_could_not_tell_of_all_modules_makes_owners_unknown_for_good() {
        let board = Board::new(RunInfo::default());
        board.model(JobId::default(), 0, 0, &modules(0, 10));
        board.others(JobId::default(), 1, &["a".to_owned()].into_iter().collect());
        assert_eq!(board.known().info.owners.len(), 2);
        board.model(JobId::default(), 1, 0, &modules(0, MAX_NAMES + 1));
        board.model(JobId::default(), 2, 0, &modules(0, 10));
        let known = board.known();
        assert!(known.info.owners.is_empty(), "{:?}", known.info.owners.len());
        assert_eq!(known.info.notices.len(), 2, "{:?}", known.info.notices);
    }

    #[test]
    fn what_every_rank_says_alike_is_there_once() {
        let board = Board::new(RunInfo::default());
        (0..4).for_each(|rank| board.model(JobId::default(), rank, 0, &modules(0, 10)));
        board.model(JobId::default(), 4, 0, &modules(5, 10));
        let known = board.known();
        let (all, owners) = (&known.info.models[0].modules, &known.info.owners);
        assert_eq!((all.len(), owners.len(), owners[0].ranks.len()), (15, 2, 4));
        assert!(Arc::ptr_eq(&all[7].name, owners[1].modules.iter().find(|n| ***n == *"m.7").unwrap()));
    }

    #[test]
    fn a_command_line_is_kept_as_far_as_it_fits() {
        assert_eq!(short(vec!["a".into(), "b".into()], MAX_TEXT), ["a", "b"]);
        assert_eq!(
            short(vec!["a".into(), "b".repeat(MAX_TEXT), "c".into()], MAX_TEXT),
            ["a", "... (2 more arguments)"]
        );
        assert_eq!(start_of("aé", 2), "a");
    }
}
