//! Tells of parts one by one, each once it is known of which pass it is: for what follows a run and keeps none of it.
//!
//! A reader of runs knows all passes of a run, and shows what is not known yet as pending. Whatever charts, counts or names
//! records while the job runs has one chance. So a part waits here until it is decided whether ranks made its pass together,
//! which is one pass later as a rule. What is known of passes is bounded, and so is what waits: a part that must not wait any
//! longer is told of as its own rank's alone.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    mem,
};

use wire::{hooks::Kind, passes::Pass};

use crate::{
    format::{Identity, JobId, JobInfo, Line, Part, What},
    passes::{Local, Passes, Verdict},
};

/// Newest attempts of jobs of whose passes anything is known.
pub const MAX_JOBS: usize = 64;
/// Newest passes of which anything is known, of all of these together.
pub const MAX_PASSES: usize = 1 << 14;
/// Most parts that wait.
pub const MAX_WAITING: usize = 1 << 13;
/// Passes in a manifest after which it is looked at what is known by now.
const LOOK: usize = 256;

/// What is told of.
#[derive(Clone, Debug)]
pub enum Told {
    /// A part, under the identity of its record.
    Part {
        /// It.
        part: Box<Part>,
        /// The ranks that made its pass, where not all did.
        only: Option<BTreeSet<u32>>,
    },
    /// A part that should be equal to that of a rank, and differs.
    Differs {
        /// It.
        what: Box<What>,
        /// The other's rank.
        against: u32,
    },
}

impl Told {
    /// A part as it was stored.
    pub fn part(part: Part) -> Self {
        Self::Part { part: Box::new(part), only: None }
    }
}

/// What waits, and what is known.
#[derive(Debug, Default)]
pub struct Joining {
    jobs: BTreeMap<JobId, Job>,
    waiting: VecDeque<Told>,
    /// Passes since the last look.
    passes: usize,
}

#[derive(Debug, Default)]
struct Job {
    /// Its ranks have a process group, so that they tell of passes.
    tells: bool,
    passes: Passes,
}

/// What becomes of something.
enum Fate {
    Told(Told),
    Waits(Told),
    /// What differs is of two passes, and may.
    Nothing,
}

impl Joining {
    /// Takes a line of a manifest in, and tells what is known by it.
    pub fn line(&mut self, line: Line) -> Vec<Told> {
        match line {
            Line::Part(part) => return self.tell(Told::part(part)),
            Line::Divergence { what, against } => {
                return self.tell(Told::Differs { what: Box::new(what), against });
            }
            Line::Job(info) => self.job(&info),
            Line::Pass { job, rank, pass } => self.passed(job, rank, &pass),
            Line::Left { job, rank } => self.left(job, rank),
            Line::Refused { .. } | Line::Dropped { .. } | Line::Sealed { .. } => return Vec::new(),
        }
        if self.passes >= LOOK { self.look() } else { Vec::new() }
    }

    /// What is known of a job.
    pub fn job(&mut self, info: &JobInfo) {
        if self.jobs.len() >= MAX_JOBS && !self.jobs.contains_key(&info.id) {
            self.jobs.pop_first();
        }
        let job = self.jobs.entry(info.id).or_default();
        job.tells |= !info.group.is_empty();
        job.passes.hear_only(&info.here);
    }

    /// A rank has told of a pass.
    pub fn passed(&mut self, id: JobId, rank: u32, pass: &Pass) {
        if let Some(job) = self.jobs.get_mut(&id) {
            job.passes.add(id, rank, pass);
            self.passes += 1;
        }
    }

    /// A rank is gone.
    pub fn left(&mut self, id: JobId, rank: u32) {
        if let Some(job) = self.jobs.get_mut(&id) {
            job.passes.left(rank);
        }
    }

    /// Something came. Told at once if it is known of which pass it is; what has waited longest is too, where too much waits.
    pub fn tell(&mut self, told: Told) -> Vec<Told> {
        match self.fate(told, false) {
            Fate::Told(told) => vec![told],
            Fate::Nothing => Vec::new(),
            Fate::Waits(told) => {
                self.waiting.push_back(told);
                let longest = if self.waiting.len() > MAX_WAITING { self.waiting.pop_front() } else { None };
                longest.map(alone).into_iter().collect()
            }
        }
    }

    /// What is known by now of what has waited.
    pub fn look(&mut self) -> Vec<Told> {
        if mem::take(&mut self.passes) > 0 || !self.waiting.is_empty() {
            let most = MAX_PASSES / self.jobs.len().max(1);
            for job in self.jobs.values_mut() {
                job.passes.decide(false);
                job.passes.keep(most);
            }
        }
        self.settle(false)
    }

    /// All that has waited: no rank that is gone comes back, and of others nothing more will be told here.
    pub fn end(&mut self) -> Vec<Told> {
        for job in self.jobs.values_mut() {
            let over = job.passes.are_over();
            job.passes.decide(over);
        }
        self.settle(true)
    }

    /// Whether parts are known to be of one pass, or their numbers are all that ranks say.
    pub fn are_one<'a>(&self, parts: impl Iterator<Item = &'a Place>) -> bool {
        let mut first = None;
        parts.into_iter().all(|place| match self.verdict(place, false) {
            Verdict::Joint(joint) => *first.get_or_insert_with(|| Some(joint.clone())) == Some(joint),
            Verdict::Pending => false,
            Verdict::Unsaid => !self.tells(place, false) && first.get_or_insert(None).is_none(),
        })
    }

    fn settle(&mut self, end: bool) -> Vec<Told> {
        let mut out = Vec::new();
        for told in mem::take(&mut self.waiting) {
            match self.fate(told, end) {
                Fate::Told(told) => out.push(told),
                Fate::Waits(told) if end => out.push(alone(told)),
                Fate::Waits(told) => self.waiting.push_back(told),
                Fate::Nothing => {}
            }
        }
        out
    }

    fn fate(&self, told: Told, end: bool) -> Fate {
        match told {
            Told::Part { part, .. } => self.fate_of_part(part, end),
            Told::Differs { what, against } => {
                let place = Place::of(&what);
                let of = |rank| self.verdict(&Place { local: place.local.on(rank), ..place }, end);
                let tells = self.tells(&place, end);
                match (of(what.rank), of(against)) {
                    (Verdict::Joint(one), Verdict::Joint(other)) if one != other => Fate::Nothing,
                    (Verdict::Joint(_), Verdict::Joint(_)) => Fate::Told(Told::Differs { what, against }),
                    (Verdict::Unsaid, Verdict::Unsaid) if !tells => Fate::Told(Told::Differs { what, against }),
                    _ => Fate::Waits(Told::Differs { what, against }),
                }
            }
        }
    }

    fn fate_of_part(&self, mut part: Box<Part>, end: bool) -> Fate {
        let place = Place::of(&part.what);
        match self.verdict(&place, end) {
            Verdict::Joint(joint) => {
                let only = (!joint.by_all).then(|| joint.ranks.clone());
                part.what.id = joint.identity(&part.what.id, place.local);
                if mem::take(&mut part.what.id.own) {
                    part.what.id.apart = Some(part.what.rank);
                    return Fate::Told(Told::Part { only: Some(BTreeSet::from([part.what.rank])), part });
                }
                Fate::Told(Told::Part { part, only })
            }
            Verdict::Unsaid if part.what.axes.is_empty() || !self.tells(&place, end) => Fate::Told(Told::part(*part)),
            Verdict::Pending | Verdict::Unsaid => Fate::Waits(Told::part(*part)),
        }
    }

    fn verdict(&self, place: &Place, end: bool) -> Verdict {
        match self.jobs.get(&place.local.job()) {
            Some(job) if place.is_of_parameter => job.passes.of_parameter(place.local, end && job.passes.are_over()),
            Some(job) => job.passes.verdict(place.local),
            None => Verdict::Unsaid,
        }
    }

    /// Whether its rank tells of passes of the model; at the `end`, whether it has told of any.
    fn tells(&self, place: &Place, end: bool) -> bool {
        let (id, rank, model) = (place.local.job(), place.local.rank(), place.local.model());
        match self.jobs.get(&id) {
            Some(job) if end => job.passes.has_told(rank, model),
            Some(job) => job.tells,
            // Forgotten, or never heard of.
            None => self.jobs.len() >= MAX_JOBS && self.jobs.keys().next().is_some_and(|first| id < *first),
        }
    }
}

/// Of which pass a part is, as its rank counts.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    local: Local,
    is_of_parameter: bool,
}

impl Place {
    /// That of a part.
    pub fn of(what: &What) -> Self {
        Self { local: Local::of(what), is_of_parameter: what.id.kind.is_in(Kind::OF_PARAMETERS) }
    }
}

/// What nothing is known of, as its rank's alone. Whether parts differ that should not is for a reader to say.
fn alone(told: Told) -> Told {
    match told {
        Told::Part { mut part, .. } => {
            let only = Some(BTreeSet::from([part.what.rank]));
            part.what.id = Identity { apart: Some(part.what.rank), ..part.what.id };
            Told::Part { part, only }
        }
        differs @ Told::Differs { .. } => differs,
    }
}

#[cfg(test)]
mod tests;
