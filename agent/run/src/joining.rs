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

use wire::passes::Pass;

use crate::{
    format::{Identity, JobId, JobInfo, Line, Part, What, memory_of},
    passes::{Passes, Place, Verdict},
};

/// Newest attempts of jobs of whose passes anything is known.
pub const MAX_JOBS: usize = 64;
/// Newest passes of which anything is known, of all of these together; about 400 bytes each.
pub const NEWEST: usize = 1 << 15;
/// And of a job whose ranks are gone.
const NEWEST_OF_GONE: usize = 1 << 10;
/// Most memory of what waits. A part of usual shape and layout takes about 600 bytes.
pub const MAX_WAITING: usize = 16 << 20;
/// Passes in a manifest after which it is looked at what is known by now.
const LOOK: usize = 256;
/// Looks in vain, half a minute of a job, after which ranks that have told of no pass are taken for those of another node, where
/// launchers do not say who is here.
const PATIENCE: u32 = 60;

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

    /// Memory of it, about.
    fn bytes(&self) -> usize {
        let what = match self {
            Self::Part { part, .. } => &part.what,
            Self::Differs { what, .. } => what,
        };
        let names = what.id.module.len() + what.id.path.len() + what.class.len() + what.group.len();
        size_of::<Part>() + names + size_of_val(&what.shape[..]) + memory_of(&what.axes)
    }
}

/// What waits, and what is known.
#[derive(Debug, Default)]
pub struct Joining {
    jobs: BTreeMap<JobId, Job>,
    /// Jobs that came before these are forgotten.
    has_forgotten: bool,
    waiting: VecDeque<Told>,
    /// Memory of these.
    bytes: usize,
    /// Passes since the last look.
    passes: usize,
}

#[derive(Debug, Default)]
struct Job {
    /// Its ranks have a process group, so that they tell of passes.
    tells: bool,
    passes: Passes,
    /// How many jobs came before.
    number: usize,
    /// Looks since something was decided.
    in_vain: u32,
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
    #[must_use]
    pub fn line(&mut self, line: Line) -> Vec<Told> {
        match line {
            Line::Part(part) => return self.tell(Told::part(part)),
            Line::Divergence { what, against } => {
                return self.tell(Told::Differs { what: Box::new(what), against });
            }
            Line::Job(info) => self.job(&info),
            Line::Pass { job, rank, pass } => self.passed(job, rank, &pass),
            Line::Left { job, rank } => self.left(job, rank),
            Line::Refused { .. } | Line::Dropped { .. } | Line::Revision(_) | Line::Sealed { .. } => return Vec::new(),
        }
        if self.passes >= LOOK { self.look() } else { Vec::new() }
    }

    /// What is known of a job.
    pub fn job(&mut self, info: &JobInfo) {
        let number = self.jobs.values().map(|job| job.number + 1).max().unwrap_or_default();
        let oldest = self.jobs.iter().min_by_key(|(_, job)| job.number).map(|(id, _)| *id);
        if let Some(oldest) = oldest.filter(|_| self.jobs.len() >= MAX_JOBS && !self.jobs.contains_key(&info.id)) {
            self.jobs.remove(&oldest);
            self.has_forgotten = true;
        }
        let job = self.jobs.entry(info.id).or_insert_with(|| Job { number, ..Job::default() });
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
    #[must_use]
    pub fn tell(&mut self, told: Told) -> Vec<Told> {
        match self.fate(told, false) {
            Fate::Told(told) => vec![told],
            Fate::Nothing => Vec::new(),
            Fate::Waits(told) => {
                self.wait(told);
                if self.bytes > MAX_WAITING { self.make_room() } else { Vec::new() }
            }
        }
    }

    fn wait(&mut self, told: Told) {
        self.bytes += told.bytes();
        self.waiting.push_back(told);
    }

    /// Tells of what has waited longest, where nothing is known of it by now; not of a little, so that looks are rare.
    fn make_room(&mut self) -> Vec<Told> {
        let mut out = if self.passes > 0 { self.look() } else { Vec::new() };
        if self.bytes > MAX_WAITING / 4 * 3 {
            while self.bytes > MAX_WAITING / 2
                && let Some(told) = self.waiting.pop_front()
            {
                self.bytes -= told.bytes();
                out.push(alone(told));
            }
        }
        out
    }

    /// What is known by now of what has waited.
    #[must_use]
    pub fn look(&mut self) -> Vec<Told> {
        self.passes = 0;
        let live = self.jobs.values().filter(|job| !job.passes.are_over()).count();
        for job in self.jobs.values_mut() {
            let decided = job.passes.decide(false);
            job.in_vain = if decided.is_empty() && job.passes.are_undecided() { job.in_vain + 1 } else { 0 };
            if job.in_vain > PATIENCE {
                job.passes.hear_only_who_told();
            }
            job.passes.keep(if job.passes.are_over() { NEWEST_OF_GONE } else { NEWEST / live });
        }
        self.settle(false)
    }

    /// All that has waited; `over`: no rank will tell of more.
    #[must_use]
    pub fn end(&mut self, over: bool) -> Vec<Told> {
        for job in self.jobs.values_mut() {
            let over = over || job.passes.are_over();
            job.passes.decide(over);
        }
        self.settle(true)
    }

    /// Whether parts are known to be of one pass that all ranks made, and are called as that is; or their numbers are all that
    /// ranks say.
    pub fn are_one(&self, parts: impl Iterator<Item = Place>) -> bool {
        let mut first = None;
        parts.into_iter().all(|place| match self.verdict(place, false) {
            Verdict::Joint(joint) if !joint.is_named(place.local) => false,
            Verdict::Joint(joint) => *first.get_or_insert_with(|| Some(joint.clone())) == Some(joint),
            Verdict::Pending => false,
            Verdict::Unsaid => !self.tells(place, false) && first.get_or_insert(None).is_none(),
        })
    }

    /// Whether it is known of which pass a part is, or never will be.
    pub fn is_decided(&self, place: Place) -> bool {
        match self.verdict(place, false) {
            Verdict::Joint(_) => true,
            Verdict::Pending => false,
            Verdict::Unsaid => !self.tells(place, false),
        }
    }

    fn settle(&mut self, end: bool) -> Vec<Told> {
        let mut out = Vec::new();
        self.bytes = 0;
        for told in mem::take(&mut self.waiting) {
            match self.fate(told, end) {
                Fate::Told(told) => out.push(told),
                Fate::Waits(told) if end => out.push(alone(told)),
                Fate::Waits(told) => self.wait(told),
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
                let of = |rank| self.verdict(place.on(rank), end);
                let tells = self.tells(place, end);
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
        match self.verdict(place, end) {
            Verdict::Joint(joint) => {
                let only = (!joint.by_all).then(|| joint.ranks.clone());
                part.what.id = joint.identity(&part.what.id, place.local);
                if mem::take(&mut part.what.id.own) {
                    part.what.id.apart = Some(part.what.rank);
                    return Fate::Told(Told::Part { only: Some(BTreeSet::from([part.what.rank])), part });
                }
                Fate::Told(Told::Part { part, only })
            }
            Verdict::Unsaid if part.what.axes.is_empty() || !self.tells(place, end) => Fate::Told(Told::part(*part)),
            Verdict::Pending | Verdict::Unsaid => Fate::Waits(Told::part(*part)),
        }
    }

    fn verdict(&self, place: Place, end: bool) -> Verdict {
        self.jobs.get(&place.local.job()).map_or(Verdict::Unsaid, |job| job.passes.of_part(place, end))
    }

    /// Whether its rank tells of passes of the model; at the `end`, whether it has told of any.
    fn tells(&self, place: Place, end: bool) -> bool {
        let (id, rank, model) = (place.local.job(), place.local.rank(), place.local.model());
        match self.jobs.get(&id) {
            // Gathered from a rank that tells the agent of another node.
            Some(job) if !job.passes.hears(rank) => false,
            Some(job) if end => job.passes.has_told(rank, model),
            Some(job) => job.tells,
            // Jobs are told of before their parts.
            None => self.has_forgotten,
        }
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
