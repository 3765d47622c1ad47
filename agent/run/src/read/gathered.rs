//! The records of a run, as far as its manifests have been read: of one folder, or of several nodes'.
//!
//! A [`Run`] is a snapshot of it. What the two share are whole records; one that changes later is another then, so that
//! what was taken of a snapshot stays as it was, and taking the next one costs no more than what has changed.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    path::{Path, PathBuf},
    sync::Arc,
};

use wire::hooks::Kind;

use super::{
    Lost, OpenError, Record, Records, Run, Shards, Source,
    folder::{Change, Folder},
    in_seats,
    jobs::{Numbers, Table},
    layout, nodes,
};
use crate::{
    format::{Identity, JobId, JobInfo, Joined, Owners, Part, RunInfo, What},
    ownership::{PartialOwnership, lie_alone, lie_among},
    passes::{Joint, Local, Passes, Place, Verdict},
};

/// The records of a run.
pub struct Gathered {
    path: PathBuf,
    /// Names of the nodes; none for a run of one folder.
    nodes: Vec<String>,
    folders: Vec<Folder>,
    /// In the order of their first part.
    slots: Vec<Slot>,
    by_id: HashMap<Identity, usize>,
    /// Those of the slots, settled.
    records: Records,
    /// Slots that have got parts and are not settled.
    changed: Vec<usize>,
    /// Slots of parts that are called as another one.
    again: Vec<usize>,
    /// How many there are of a slot's seat, but for the first.
    doubles: HashMap<(usize, (u32, u32)), u32>,
    parts: u64,
    /// Bytes of manifests that were read before all was read anew.
    before: u64,
    /// Of several nodes: what the jobs of their folders are in the run.
    numbers: Numbers,
    /// Of several nodes: the folders that have parts of a rank of a job.
    folder_of: BTreeMap<(JobId, u32), BTreeSet<usize>>,
    /// By which slots are settled.
    owners: (Vec<Owners>, BTreeMap<JobId, u32>),
    /// Of several nodes: replicas that differ and whose difference no agent saw.
    differing: BTreeMap<usize, Vec<(What, u32)>>,
    /// Of each job.
    passes: BTreeMap<JobId, Passes>,
    /// Ranks have told of some.
    has_passes: bool,
    /// Of how many models of ranks.
    told: usize,
    /// Slots with parts of passes that are not decided.
    waiting: HashMap<Local, BTreeSet<usize>>,
    /// Slots that have lost their last part to another.
    empty: BTreeSet<usize>,
    /// Passes were decided since no rank told of more at that time.
    decided_early: bool,
    source: Arc<Source>,
    /// Whether more is to be read later.
    growing: bool,
    /// Whether the records were let go.
    over: bool,
}

struct Slot {
    record: Arc<Record>,
    /// That of the first which is called the same.
    base: Option<usize>,
    /// As it was written, where that is another and is needed once more is read.
    written: Option<Arc<Record>>,
    /// Of several nodes: the folders with parts of it, and which of their parts the first one is.
    folders: Vec<(usize, u64)>,
    changed: bool,
    /// The pass that it is of, where not all ranks made that.
    apart: Option<Arc<Joint>>,
    /// It has parts that came under other numbers.
    has_moved: bool,
}

impl Gathered {
    /// Of the run in a folder, or of those of a job's nodes in it. Nothing is read.
    pub fn of(path: &Path) -> Result<Self, OpenError> {
        if path.is_dir() && !nodes::is_run(path) {
            let names = nodes::inside(path);
            if names.len() > 1 {
                nodes::expect_few(path, &names)?;
                let folders = names.iter().map(|name| Folder::new(path.join(name), name)).collect();
                return Ok(Self::new(path, names, folders));
            }
        }
        Self::of_one(path)
    }

    /// Of the run in a folder.
    pub fn of_one(path: &Path) -> Result<Self, OpenError> {
        if !path.is_dir() {
            let reason = if path.exists() { "not a directory; give the run's folder" } else { "no such run directory" };
            return Err(OpenError::NotARun { path: path.display().to_string(), reason: reason.into() });
        }
        Ok(Self::new(path, Vec::new(), vec![Folder::new(path.to_owned(), "")]))
    }

    fn new(path: &Path, nodes: Vec<String>, folders: Vec<Folder>) -> Self {
        let source = Arc::new(Source::new(Shards::of_nodes(path, &nodes)));
        Self {
            path: path.to_owned(),
            nodes,
            folders,
            slots: Vec::new(),
            by_id: HashMap::new(),
            records: Records::default(),
            changed: Vec::new(),
            again: Vec::new(),
            doubles: HashMap::new(),
            parts: 0,
            before: 0,
            numbers: Numbers::default(),
            folder_of: BTreeMap::new(),
            owners: Default::default(),
            differing: BTreeMap::new(),
            passes: BTreeMap::new(),
            has_passes: false,
            told: 0,
            waiting: HashMap::new(),
            empty: BTreeSet::new(),
            decided_early: false,
            source,
            growing: false,
            over: false,
        }
    }

    /// The same, to be read on later.
    pub fn growing(self) -> Self {
        Self { growing: true, ..self }
    }

    /// Names of the nodes; none for a run of one folder.
    pub fn nodes(&self) -> &[String] {
        &self.nodes
    }

    /// Parts that were written.
    pub fn parts(&self) -> u64 {
        self.parts
    }

    /// Bytes of manifests that were read.
    pub fn read(&self) -> u64 {
        self.before + self.folders.iter().map(|folder| folder.read).sum::<u64>()
    }

    /// Reads what is new. With [`Change::Other`], and after an error, nothing more is to be had here.
    pub fn read_on(&mut self) -> Result<Change, OpenError> {
        if self.over {
            let same = self.folders.iter().all(Folder::is_as_it_was);
            return Ok(if same { Change::None } else { Change::Other });
        }
        let mut change = Change::None;
        for folder in &mut self.folders {
            change = change.max(folder.look_at_info());
        }
        if !self.nodes.is_empty() && change != Change::None {
            nodes::expect_one_job(&self.path, &self.folders)?;
        }
        let known = self.parts;
        loop {
            change = change.max(self.read_folders()?);
            if change == Change::Other {
                return Ok(change);
            }
            if !self.is_renumbered() {
                break;
            }
        }
        self.expect_ranks_apart()?;
        for (number, folder) in self.folders.iter_mut().enumerate() {
            for (job, rank, pass) in std::mem::take(&mut folder.passes) {
                let job = self.numbers.number(number, job);
                let passes = self.passes.entry(job).or_default();
                match pass {
                    Some(pass) => passes.add(job, rank, &pass),
                    None => passes.left(rank),
                }
            }
            // Of one node of several, those are all that are ever heard of.
            for (id, info) in folder.jobs.iter().filter(|_| self.nodes.is_empty()) {
                if let Some(passes) = self.passes.get_mut(id) {
                    passes.hear_only(&info.here);
                }
            }
        }
        Ok(if self.decided_early && self.parts > known { Change::Other } else { change })
    }

    /// Whether jobs turned out to have other numbers in the run than was thought. Then nothing is read any more.
    fn is_renumbered(&mut self) -> bool {
        if self.nodes.is_empty() {
            return false;
        }
        let tables: Vec<&Table> = self.folders.iter().map(|folder| &folder.jobs).collect();
        let numbers = Numbers::of(&tables);
        if numbers == self.numbers {
            return false;
        }
        let before = self.read();
        let fresh = self.nodes.iter().map(|name| Folder::new(self.path.join(name), name)).collect();
        *self = Self { numbers, growing: self.growing, before, ..Self::new(&self.path, self.nodes.clone(), fresh) };
        self.folders.iter_mut().for_each(|folder| _ = folder.look_at_info());
        true
    }

    /// Puts the parts of records that have changed in order. Those that are called as another one are records of their own.
    fn seat(&mut self) {
        let mut at = 0;
        while let Some(&slot) = self.changed.get(at) {
            at += 1;
            for mut part in in_seats(&mut Arc::make_mut(&mut self.slots[slot].record).parts) {
                let count = self.doubles.entry((slot, part.what.seat())).or_default();
                *count = count.saturating_add(1);
                part.what.id.again = *count;
                let known = self.by_id.get(&part.what.id).copied();
                let at = known.unwrap_or_else(|| {
                    self.again.push(self.slots.len());
                    self.by_id.insert(part.what.id.clone(), self.slots.len());
                    self.slots.push(Slot { base: Some(slot), ..Slot::new(part.what.id.clone()) });
                    self.slots.len() - 1
                });
                let slot = &mut self.slots[at];
                slot.change(at, &mut self.changed);
                Arc::make_mut(&mut slot.record).parts.push(part);
            }
        }
    }

    fn read_folders(&mut self) -> Result<Change, OpenError> {
        let mut change = Change::None;
        for number in 0..self.folders.len() {
            let Self { folders, slots, by_id, changed, folder_of, nodes, parts, numbers, .. } = self;
            let of_several = !nodes.is_empty();
            change = change.max(folders[number].read_on(&mut |mut part| {
                *parts += 1;
                // Readers number those that are called the same.
                part.what.id.again = 0;
                if of_several {
                    part.what.id.job = numbers.number(number, part.what.id.job);
                    folder_of.entry((part.what.id.job, part.what.rank)).or_default().insert(number);
                }
                let at = slot_of(&part.what.id, slots, by_id);
                let slot = &mut slots[at];
                if of_several && slot.folders.iter().all(|(folder, _)| *folder != number) {
                    slot.folders.push((number, *parts));
                }
                slot.change(at, changed);
                Arc::make_mut(&mut slot.record).parts.push(part);
            })?);
            if change == Change::Other {
                break;
            }
        }
        Ok(change)
    }

    /// Puts parts into the records of the passes that they are of.
    fn join(&mut self) {
        let over = self.folders.iter().all(Folder::is_over);
        let decided: Vec<Local> = self.passes.values_mut().flat_map(|passes| passes.decide(over)).collect();
        let closed = self.folders.iter().all(Folder::is_closed);
        self.decided_early |= over && !closed && !self.passes.is_empty();
        let mut again: BTreeSet<usize> = self.changed.iter().copied().collect();
        for local in &decided {
            for local in [*local, local.of_parameters()] {
                again.extend(self.waiting.remove(&local).unwrap_or_default());
            }
        }
        // What is known by its numbers alone while nothing is said of its model is not, once something is.
        let told = self.passes.values().map(Passes::models_told).sum();
        if over || told > std::mem::replace(&mut self.told, told) {
            again.extend(std::mem::take(&mut self.waiting).into_values().flatten());
        }
        if !self.passes.is_empty() {
            if !std::mem::replace(&mut self.has_passes, true) {
                again.extend(0..self.slots.len());
            }
            self.place(again, over);
        }
        self.seat();
    }

    /// Finds the records of those parts in some slots of which that is not decided.
    fn place(&mut self, slots: BTreeSet<usize>, over: bool) {
        let taken: Vec<(usize, Part)> =
            slots.iter().flat_map(|&at| self.take_undecided(at).into_iter().map(move |part| (at, part))).collect();
        let mut undecided = Vec::new();
        for (at, mut part) in taken {
            let place = Place::of(&part.what);
            let verdict = match self.passes.get(&part.what.id.job) {
                Some(passes) => passes.of_part(place, over),
                None => Verdict::Unsaid,
            };
            let Verdict::Joint(joint) = verdict else {
                undecided.push((at, part));
                continue;
            };
            let id = joint.identity(&part.what.id, place.local);
            let place = slot_of(&id, &mut self.slots, &mut self.by_id);
            part.what.joined = if joint.assumed { Joined::Assumed } else { Joined::Known };
            part.what.id = id;
            self.slots[place].apart = (!joint.by_all).then_some(joint);
            undecided.extend(self.take_undecided(place).into_iter().map(|other| (place, other)));
            self.put(at, place, part);
        }
        for (at, part) in undecided {
            self.wait(at, part, over);
        }
        let are_empty = slots.into_iter().filter(|&at| self.slots[at].record.parts.is_empty());
        self.empty.extend(are_empty.collect::<Vec<_>>());
    }

    /// Takes parts out of a slot of which it is not decided whose record they are.
    fn take_undecided(&mut self, at: usize) -> Vec<Part> {
        let slot = &mut self.slots[at];
        if !slot.record.parts.iter().any(is_undecided) {
            return Vec::new();
        }
        slot.change(at, &mut self.changed);
        let parts = &mut Arc::make_mut(&mut slot.record).parts;
        let (taken, kept) = parts.drain(..).partition(is_undecided);
        *parts = kept;
        taken
    }

    /// Puts a part from one slot into another, or back.
    fn put(&mut self, from: usize, to: usize, part: Part) {
        let folders = if from == to { Vec::new() } else { self.slots[from].folders.clone() };
        let slot = &mut self.slots[to];
        slot.change(to, &mut self.changed);
        Arc::make_mut(&mut slot.record).parts.push(part);
        slot.folders.extend(folders);
        slot.has_moved |= from != to;
        self.empty.remove(&to);
    }

    /// Puts a part where it waits until it is known of which pass it is: in the slot of the numbers that its rank says, unless
    /// that has the parts of another pass.
    fn wait(&mut self, at: usize, mut part: Part, over: bool) {
        // Of a model of which a rank says nothing, its numbers are all that is known: it is on no mesh, or the rank's agent is
        // another node's.
        let passes = self.passes.get(&part.what.id.job);
        let by_number = part.what.axes.is_empty()
            || (over && part.what.id.kind.is_in(Kind::OF_PARAMETERS))
            || !passes.is_some_and(|passes| passes.has_told(part.what.rank, part.what.id.model));
        part.what.joined = if by_number { Joined::ByNumber } else { Joined::Pending };
        let plain = Identity { pending: false, ..part.what.id.clone() };
        let own = slot_of(&plain, &mut self.slots, &mut self.by_id);
        let seat = part.what.seat();
        let takes = |other: &Part| !is_undecided(other) && (!by_number || other.what.seat() == seat);
        let is_taken = self.slots[own].record.parts.iter().any(takes);
        let id = Identity { pending: is_taken, ..plain };
        let local = Local::of(&part.what);
        let place = slot_of(&id, &mut self.slots, &mut self.by_id);
        part.what.id = id;
        self.put(at, place, part);
        if !over {
            self.waiting.entry(local).or_default().insert(place);
        }
    }

    /// Refuses folders that have ranks in common: they are not of one job. Of the lowest rank, since the order of a manifest
    /// is chance.
    fn expect_ranks_apart(&self) -> Result<(), OpenError> {
        let mut of_rank: BTreeMap<u32, BTreeSet<usize>> = BTreeMap::new();
        let mut conflict: Option<(u32, usize, usize)> = None;
        let mut found = |rank: u32, one: usize, other: usize| {
            let found = (rank, one.min(other), one.max(other));
            conflict = Some(conflict.map_or(found, |known| known.min(found)));
        };
        for ((_, rank), folders) in &self.folder_of {
            if let (Some(&one), Some(&other)) = (folders.first(), folders.iter().nth(1)) {
                found(*rank, one, other);
            }
            of_rank.entry(*rank).or_default().extend(folders);
        }
        for (rank, folders) in &of_rank {
            let strangers = folders.first().zip(
                folders.iter().find(|&&other| folders.first().is_some_and(|&one| !self.numbers.are_kin(one, other))),
            );
            if let Some((&one, &other)) = strangers {
                found(*rank, one, other);
            }
        }
        match conflict {
            None => Ok(()),
            Some((rank, one, other)) => {
                let (one, other) = (&self.nodes[one], &self.nodes[other]);
                Err(nodes::refusal(&self.path, &format!("{one} and {other} both have rank {rank}")))
            }
        }
    }

    /// Gives parts their bytes that another rank sent, and makes those of modules that some ranks lack lie among those
    /// that have them.
    fn settle(&mut self, owners: &[Owners], jobs: &[JobInfo]) {
        let worlds: BTreeMap<JobId, u32> = jobs.iter().map(|info| (info.id, info.world)).collect();
        let partial_of = |(owners, worlds): &(Vec<Owners>, BTreeMap<JobId, u32>)| {
            let of = |(&job, &world): (&JobId, &u32)| (job, PartialOwnership::new(job, owners, world));
            let known = worlds.iter().map(of).filter(|(_, partial)| !partial.is_empty());
            known.collect::<BTreeMap<JobId, PartialOwnership>>()
        };
        let now = (owners.to_vec(), worlds);
        let partial = partial_of(&now);
        if self.owners != now {
            let known = partial_of(&self.owners);
            self.owners = now;
            if !(known.is_empty() && partial.is_empty()) {
                for (at, slot) in self.slots.iter_mut().enumerate() {
                    slot.change(at, &mut self.changed);
                }
            }
        }
        let mut changed = std::mem::take(&mut self.changed);
        changed.sort_unstable();
        for at in changed {
            let slot = &mut self.slots[at];
            slot.changed = false;
            let partial = partial.get(&slot.record.id.job).filter(|partial| partial.knows(&slot.record.id));
            if layout::are_unsettled(&slot.record.parts) || partial.is_some() || slot.apart.is_some() {
                slot.written = self.growing.then(|| slot.record.clone());
                let Record { id, parts } = Arc::make_mut(&mut slot.record);
                layout::settle(parts);
                match &slot.apart {
                    Some(_) if id.own => lie_alone(parts),
                    Some(joint) => lie_among(parts, &joint.ranks),
                    None => {
                        if let Some(partial) = partial {
                            partial.settle(parts);
                        }
                    }
                }
            }
            self.records.set(at, slot.record.clone());
            if !self.nodes.is_empty() || slot.has_moved {
                let parts = &slot.record.parts;
                let found = layout::differing_replicas(parts).into_iter();
                let found: Vec<(What, u32)> =
                    found.map(|(first, other)| (parts[other].what.clone(), parts[first].what.rank)).collect();
                match found.is_empty() {
                    true => _ = self.differing.remove(&at),
                    false => _ = self.differing.insert(at, found),
                }
            }
        }
    }

    /// The run as far as it was read.
    pub fn run(&mut self) -> Result<Run, OpenError> {
        self.join();
        let (mut infos, mut problems, mut notes) = (Vec::new(), Vec::new(), Vec::new());
        for (number, folder) in self.folders.iter().enumerate() {
            let is_its = |part: &&Part| {
                let of = || self.folder_of.get(&(part.what.id.job, part.what.rank));
                self.nodes.is_empty() || of().is_some_and(|folders| folders.contains(&number))
            };
            let again = self.again.iter().flat_map(|&at| &self.slots[at].record.parts).filter(is_its).count();
            let (mut info, its_problems, its_notes) = folder.opened(again as u64)?;
            info.owners.iter_mut().for_each(|group| group.job = self.numbers.number(number, group.job));
            infos.push(info);
            problems.extend(its_problems);
            notes.extend(its_notes);
        }
        let mut info = match self.nodes.is_empty() {
            true => infos.pop().unwrap_or_default(),
            false => nodes::joined(infos, self.slots.len() as u64),
        };
        let jobs = self.jobs(&info);
        self.settle(&info.owners, &jobs);
        let order = (!self.nodes.is_empty() || !self.again.is_empty()).then(|| self.order());
        let mut lost = Lost::default();
        for (number, folder) in self.folders.iter().enumerate() {
            let own = |what: &What| {
                let job = self.numbers.number(number, what.id.job);
                What { id: Identity { job, ..what.id.clone() }, ..what.clone() }
            };
            lost.refused.extend(folder.lost.refused.iter().map(|(what, why)| (own(what), why.clone())));
            lost.divergences.extend(folder.lost.divergences.iter().map(|(what, against)| (own(what), *against)));
            lost.dropped.extend_from_slice(&folder.lost.dropped);
        }
        let before = lost.divergences.len();
        lost.divergences.retain(|(what, against)| {
            !self.passes.get(&what.id.job).is_some_and(|passes| passes.are_two(what, *against))
        });
        info.totals.divergences = info.totals.divergences.saturating_sub((before - lost.divergences.len()) as u64);
        if !self.differing.is_empty() {
            // No agent saw these side by side, as replicas of two nodes: it is noticed here where they differ.
            let known: HashSet<_> = lost.divergences.iter().map(|(what, _)| (&what.id, what.rank)).collect();
            let found = self.there().into_iter().filter_map(|at| self.differing.get(&at)).flatten();
            let found: Vec<_> = found.filter(|(what, _)| !known.contains(&(&what.id, what.rank))).cloned().collect();
            info.totals.divergences = info.totals.divergences.saturating_add(found.len() as u64);
            lost.divergences.extend(found);
        }
        self.source = self.source.with(self.folders.iter().map(|folder| &folder.ranks), &lost.dropped);
        let ends = self.folders.iter().flat_map(|folder| folder.ends.iter().map(|(stem, &end)| (stem.clone(), end)));
        Ok(Run {
            path: self.path.clone(),
            nodes: self.nodes.clone(),
            info,
            records: match order.or_else(|| (!self.empty.is_empty()).then(|| self.there())) {
                Some(order) => order.into_iter().map(|at| self.records[at].clone()).collect(),
                None => self.records.clone(),
            },
            jobs,
            revisions: self.numbers.revisions(self.folders.iter().map(|folder| folder.revisions.values())),
            lost,
            sealed: self.folders.iter().flat_map(|folder| folder.sealed.iter().cloned()).collect(),
            problems,
            notes,
            ends: ends.collect(),
            source: self.source.clone(),
        })
    }

    /// Slots in the order of the run: that of their first part, node after node; what is called as another one after that.
    fn order(&self) -> Vec<usize> {
        let mut order = self.there();
        order.sort_by_key(|&at| {
            let first = self.slots[at].base.unwrap_or(at);
            (self.slots[first].folders.iter().min().copied(), first, self.slots[at].record.id.again)
        });
        order
    }

    /// Slots that have parts.
    fn there(&self) -> Vec<usize> {
        (0..self.slots.len()).filter(|at| !self.empty.contains(at)).collect()
    }

    /// The jobs of the run. One that says nothing of any is of one.
    fn jobs(&self, info: &RunInfo) -> Vec<JobInfo> {
        let tables: Vec<&Table> = self.folders.iter().map(|folder| &folder.jobs).collect();
        let jobs: Vec<JobInfo> = self.numbers.joined(&tables).into_values().collect();
        if !jobs.is_empty() || info.world == 0 {
            return jobs;
        }
        let (command, hooks) = (info.command.clone(), info.hooks.clone());
        vec![JobInfo { world: info.world, command, hooks, started_ns: info.started_ns, ..JobInfo::default() }]
    }

    /// Lets go of the records of a run that is over. Should its files change all the same, it is read anew.
    pub fn let_go(&mut self) {
        self.over = true;
        (self.slots, self.by_id, self.records, self.again, self.doubles) = Default::default();
    }
}

/// Whether nobody has decided yet of which pass a part is.
fn is_undecided(part: &Part) -> bool {
    matches!(part.what.joined, Joined::ByNumber | Joined::Pending)
}

/// The slot of a record, new if there is none.
fn slot_of(id: &Identity, slots: &mut Vec<Slot>, by_id: &mut HashMap<Identity, usize>) -> usize {
    if let Some(&at) = by_id.get(id) {
        return at;
    }
    by_id.insert(id.clone(), slots.len());
    slots.push(Slot::new(id.clone()));
    slots.len() - 1
}

impl Slot {
    fn new(id: Identity) -> Self {
        let record = Arc::new(Record { id, parts: Vec::new() });
        let folders = Vec::new();
        Self { record, base: None, written: None, folders, changed: false, apart: None, has_moved: false }
    }

    /// As it was written, and to be settled again.
    fn change(&mut self, at: usize, changed: &mut Vec<usize>) {
        if !std::mem::replace(&mut self.changed, true) {
            changed.push(at);
        }
        if let Some(written) = self.written.take() {
            self.record = written;
        }
    }
}

#[cfg(test)]
mod tests;
