//! Changes the hooks of a running job: the leader's half of [`wire::revision`].
//!
//! One command at a time changes the hooks of a job. Where all of its ranks are attached to this agent it is decided in shared
//! memory, and else in the job's store, with the agents of the other nodes ([`super::nodes`]). What has come of a command is
//! told to whoever gave it within a bound ([`BOUND`]): each question to a rank has one, and a proposal that begins too soon for
//! some rank is made again a few times, further ahead.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use flexmodel_run::format::{JobId, Revision};
use serde::{Deserialize, Serialize};
use wire::{
    control::Question,
    hooks::{self, Hook},
    register::SharedRegister,
    revision::{Clause, Count, MAX_PLAN, Plan, Proposal, Register, Since, Verdict, beginning},
    store::Place,
};

use super::{
    Server,
    asking::{ASK, Found},
    board::now_ns,
    nodes::{Agent, watch::Attached},
};
use crate::text::named_ranks;

/// How long all ranks may take to confirm.
pub const CONFIRM: Duration = Duration::from_secs(10);
/// How long a command waits for the revision before it to begin, and how often it looks.
const BEGIN: Duration = Duration::from_secs(20);
const LOOK: Duration = Duration::from_millis(50);
/// After how long no proposal is made again.
const AGAIN: Duration = Duration::from_secs(30);
/// How long a command may take in all, where each of a job's nodes takes as long as it may.
pub const BOUND: Duration = Duration::from_secs(120);
/// How many times further ahead than at first a proposal begins, in turn.
const FARTHER: [u64; 3] = [1, 4, 16];
/// The same factor for a job on several nodes, whose agents hear of a proposal one after the other.
const OVER_NODES: u64 = 2;

/// What is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// These clauses besides.
    Add(String),
    /// These clauses and no others.
    Set(String),
    /// Without those of these numbers.
    Remove(Vec<u32>),
}

/// The hooks of a running job.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hooks {
    /// Number of the job in the run.
    pub job: u32,
    /// The revision in force.
    pub revision: u64,
    /// Its clauses.
    pub clauses: Vec<Clause>,
    /// Ranks that are attached to this agent.
    pub ranks: u32,
    /// What comes next.
    pub pending: Option<Pending>,
}

/// A revision that is decided upon and has not begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pending {
    /// Which.
    pub revision: u64,
    /// The step that it begins with; `None`: each rank's next pass.
    pub step: Option<u64>,
}

/// What a change has come to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Changed {
    /// The new revision.
    pub revision: u64,
    /// The step that it begins with; `None`: each rank's next pass.
    pub step: Option<u64>,
    /// Ranks that have confirmed.
    pub ranks: u32,
    /// What whoever asked should know besides.
    pub notes: Vec<String>,
}

/// Why nothing is changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refused {
    /// For what is asked.
    Bad(String),
    /// For how the job is.
    Conflict(String),
}

/// What is known of a job's hooks.
#[derive(Debug, Default)]
struct Known {
    /// The last plan that was decided upon, and the step that it begins with.
    last: Option<(Plan, Option<u64>)>,
    /// Revisions of each attempt that are in the manifest, as far as this agent knows.
    told: BTreeSet<(u32, u64)>,
    /// A command is changing them.
    changing: bool,
}

/// The hooks of all jobs, by number.
#[derive(Debug)]
pub struct Changes(Mutex<BTreeMap<u32, Known>>);

/// The right to change the hooks of a job, as long as it is there.
struct Claim<'a> {
    changes: &'a Changes,
    job: u32,
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        self.changes.of(self.job, |known| known.changing = false);
    }
}

impl Changes {
    /// Of a run in which jobs have these last revisions.
    pub fn new(revisions: Vec<Revision>) -> Self {
        let known = |Revision { job, revision, begins, clauses, last_id, .. }: Revision| {
            let plan = Plan { revision, clauses, last_id };
            let told = BTreeSet::from([(job.attempt, revision)]);
            (job.job, Known { last: Some((plan, begins)), told, changing: false })
        };
        Self(Mutex::new(revisions.into_iter().map(known).collect()))
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u32, Known>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn of<T>(&self, job: u32, f: impl FnOnce(&mut Known) -> T) -> T {
        f(self.lock().entry(job).or_default())
    }

    /// The plan of a job that has changed its hooks, for ranks that attach.
    pub fn in_force(&self, job: u32) -> Option<Plan> {
        self.lock().get(&job)?.last.as_ref().map(|(plan, _)| plan.clone())
    }

    fn claim(&self, job: u32) -> Result<Claim<'_>, Refused> {
        if self.of(job, |known| std::mem::replace(&mut known.changing, true)) {
            let text = "another command is changing the hooks of this job; try again when it is done";
            return Err(Refused::Conflict(text.into()));
        }
        Ok(Claim { changes: self, job })
    }
}

impl Server {
    /// The hooks that are in force in a running job; of the only one, if it is not said which.
    ///
    /// # Errors
    /// There is none, or no rank of it answers.
    pub async fn hooks(self: &Arc<Self>, job: Option<u32>) -> Result<Hooks, Refused> {
        let (job, ranks) = self.running(job)?;
        let lowest = ranks.iter().take(1).copied();
        let Found { plan, open, .. } = self.plans(job, lowest, ASK).await?;
        let last = self.changes.of(job.job, |known| known.last.as_ref().map(|(next, step)| (next.revision, *step)));
        let pending = last.filter(|(revision, _)| open.is_some() && *revision > plan.revision);
        let pending = pending.map(|(revision, step)| Pending { revision, step });
        Ok(Hooks { job: job.job, revision: plan.revision, clauses: plan.clauses, ranks: ranks.len() as u32, pending })
    }

    /// Changes them, on all ranks in the same step or on none.
    ///
    /// # Errors
    /// Why nothing is changed.
    pub async fn change(self: &Arc<Self>, job: Option<u32>, op: Op) -> Result<Changed, Refused> {
        let (job, ranks) = self.running(job)?;
        let _claim = self.changes.claim(job.job)?;
        let nodes = self.over_nodes(job, &ranks)?;
        let world = self.jobs.world(job);
        let began = Instant::now();
        let is_whole = matches!(op, Op::Set(_));
        let Found { plan, heard, last_id: of_ranks, .. } = self.settled(job, &ranks, is_whole).await?;
        // What takes the place of everything may do so whatever a rank has.
        let base = (!is_whole).then_some(plan.revision);
        let last_id = self.changes.of(job.job, |known| known.last.as_ref().map_or(0, |(last, _)| last.last_id));
        let (next, added) = next_plan(Plan { last_id: of_ranks.max(last_id), ..plan }, op)?;
        let mut revision = heard;
        let mut why = String::new();
        for patience in FARTHER {
            if !why.is_empty() && began.elapsed() > AGAIN {
                break;
            }
            let moments = self.moments(job, &ranks).await?;
            let patience = if nodes.is_some() { OVER_NODES * patience } else { patience };
            let begins = beginning(&moments, world, patience).map_err(Refused::Conflict)?;
            let Some(rule) = moments.first().map(|moment| moment.rule) else { break };
            revision = match &nodes {
                Some((agent, of)) => agent.next(of, revision).await.map_err(not_changed)?,
                None => revision + 1,
            };
            let plan = Plan { revision, ..next.clone() };
            let proposal = Proposal { plan, base, rule, begins };
            let outcome = match &nodes {
                Some((agent, of)) => agent.lead(of, world, &proposal).await.map_err(not_changed)?,
                None => self.propose(job, &ranks, &proposal).await?,
            };
            match outcome {
                Ok(()) => {
                    let notes = self.board.unmatched(job, &added);
                    return Ok(Changed { notes, ..self.changed(job, world, proposal) });
                }
                Err(refusal) => why = refusal,
            }
        }
        Err(Refused::Conflict(format!("nothing is changed: {why}")))
    }

    /// A proposal was decided upon: it is in the manifest before anything that is captured under it. On several nodes whoever
    /// leads and who follows may both say so.
    pub fn changed(&self, job: JobId, ranks: u32, proposal: Proposal) -> Changed {
        let Proposal { plan, begins, rule, .. } = proposal;
        let revision = plan.revision;
        if self.tell(job, plan, Since { rule, begins }) {
            self.ranks.forget_revisions(job);
        }
        Changed { revision, step: begins, ranks, notes: Vec::new() }
    }

    /// Has a revision of an attempt in the manifest, if it is not there. Whether it was not.
    pub(super) fn tell(&self, job: JobId, plan: Plan, Since { rule, begins }: Since) -> bool {
        let Plan { revision, clauses, last_id } = plan.clone();
        let is_news = self.changes.of(job.job, |known| {
            if !known.told.insert((job.attempt, revision)) {
                return false;
            }
            if known.last.as_ref().is_none_or(|(last, _)| last.revision < revision) {
                known.last = Some((plan, begins));
            }
            true
        });
        if is_news {
            let ranks = self.jobs.world(job);
            let line = Revision { job, revision, begins, rule, ranks, clauses, last_id, time_ns: now_ns() };
            self.store.revision(&line);
            self.board.live().revision(&line);
        }
        is_news
    }

    /// The job that is meant, and its ranks that are attached.
    fn running(&self, job: Option<u32>) -> Result<(JobId, BTreeSet<u32>), Refused> {
        let mut jobs = self.ranks.by_job();
        if let Some(number) = job {
            jobs.retain(|id, _| id.job == number);
        }
        // Of a job that was started again the last attempt, which has the highest number.
        let newest: BTreeMap<u32, JobId> = jobs.keys().map(|id| (id.job, *id)).collect();
        jobs.retain(|id, _| newest.get(&id.job) == Some(id));
        if jobs.len() > 1 {
            let numbers: Vec<String> = jobs.keys().map(|id| id.job.to_string()).collect();
            return Err(Refused::Conflict(format!(
                "several jobs are running in this run: {}; say which with --job",
                numbers.join(", ")
            )));
        }
        jobs.pop_first().ok_or_else(|| {
            let which = job.map_or_else(String::new, |job| format!("job {job}: "));
            Refused::Conflict(format!(
                "{which}no rank is attached: the job has not called a model yet, is over, or runs without FLEXMODEL_HOOKS \
                 (an empty one is enough)"
            ))
        })
    }

    /// How it is decided where a job has ranks on other nodes; `None`: in memory that all of its ranks share.
    fn over_nodes(self: &Arc<Self>, job: JobId, ranks: &BTreeSet<u32>) -> Result<Option<(Agent, Attached)>, Refused> {
        let world = self.jobs.world(job);
        let elsewhere = self.elsewhere(job);
        let here = elsewhere.clone().unwrap_or_else(|| (0..world).collect());
        let missing: BTreeSet<u32> = here.iter().copied().filter(|rank| !ranks.contains(rank)).collect();
        if missing.is_empty() {
            let Some(here) = elsewhere.filter(|_| ranks.len() < world as usize) else { return Ok(None) };
            let agent = self.as_one_of_several(job, true).map_err(not_changed)?;
            return Ok(Some((agent, Attached::new(self.clone(), job, here))));
        }
        Err(Refused::Conflict(format!(
            "nothing is changed: {} not attached to this agent, of {world} ranks: not every rank has called a model yet, some \
             cannot be tapped (their lines say why), or they are on other nodes and no launcher says on which",
            named_ranks(&missing, ["is", "are"])
        )))
    }

    /// The plan that all ranks have in force, once what was decided upon has begun; or of `any`, what they have.
    async fn settled(self: &Arc<Self>, job: JobId, ranks: &BTreeSet<u32>, any: bool) -> Result<Found, Refused> {
        let end = Instant::now() + BEGIN;
        loop {
            let found = self.plans(job, ranks.iter().copied(), ASK).await?;
            let last = self.changes.of(job.job, |known| known.last.as_ref().map(|(next, step)| (next.revision, *step)));
            let (revision, step) = last.unwrap_or_default();
            if found.plan.revision > 0 {
                self.tell(job, found.plan.clone(), found.since);
            }
            // Where nothing is to begin any more, a rank that did not hear what was decided stays behind.
            if found.having.len() == 1 && (found.plan.revision >= revision || found.open.is_none()) {
                return Ok(found);
            }
            if found.open.is_none() {
                return if any { Ok(found) } else { Err(Refused::Conflict(found.differ())) };
            }
            if Instant::now() > end {
                if any {
                    return Ok(found);
                }
                let step = step.filter(|_| found.open == Some(revision));
                let step = step.map_or_else(|| "each rank's next pass".to_owned(), |step| format!("step {step}"));
                return Err(Refused::Conflict(format!(
                    "nothing is changed: revision {} is yet to begin, with {step}; try again after that",
                    found.open.unwrap_or(revision)
                )));
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Has all ranks decide on a proposal. If it is abandoned, and may be made again, why.
    async fn propose(
        self: &Arc<Self>,
        job: JobId,
        ranks: &BTreeSet<u32>,
        proposal: &Proposal,
    ) -> Result<Result<(), String>, Refused> {
        let no_memory = |e| Refused::Conflict(format!("no shared memory to decide in: {e}"));
        let (register, fd) = SharedRegister::create().map_err(no_memory)?;
        let question = Question::Prepare(proposal.clone(), Place::Shared);
        let confirmed = self.confirm(job, ranks, &question, Some(Arc::new(fd)), CONFIRM).await;
        let verdict = confirmed.as_ref().map_or(Verdict::Abandoned, Count::verdict);
        match (register.settle(verdict), confirmed) {
            (Some(Verdict::Commit), _) => Ok(Ok(())),
            (_, Err(lost)) => Err(lost),
            (_, Ok(count)) => Ok(Err(match count.refusal() {
                Some((rank, why)) => format!("rank {rank} {why}"),
                None => format!("a rank came to step {} before all had confirmed", proposal.begins.unwrap_or_default()),
            })),
        }
    }
}

/// The plan after a change, and the clauses that are new in it.
fn next_plan(before: Plan, op: Op) -> Result<(Plan, Vec<Hook>), Refused> {
    let Plan { revision, mut clauses, mut last_id } = before;
    let added = match op {
        Op::Add(text) => Some(text),
        Op::Set(text) => {
            clauses.clear();
            Some(text)
        }
        Op::Remove(ids) => {
            if let Some(unknown) = ids.iter().find(|id| !clauses.iter().any(|clause| clause.id == **id)) {
                let there: Vec<String> = clauses.iter().map(|clause| clause.id.to_string()).collect();
                let there =
                    if there.is_empty() { "there are none".into() } else { format!("there are {}", there.join(", ")) };
                return Err(Refused::Bad(format!("no clause has the id {unknown}; {there}")));
            }
            if ids.is_empty() {
                return Err(Refused::Bad("no id of a clause is given".into()));
            }
            clauses.retain(|clause| !ids.contains(&clause.id));
            None
        }
    };
    let parse = |text: String| hooks::parse_clauses(&text).map_err(|e| Refused::Bad(e.to_string()));
    let added = added.map(parse).transpose()?.unwrap_or_default();
    for clause in &added {
        if let Some(why) = clause.unsupported() {
            return Err(Refused::Bad(format!("'{}': {why}", clause.text)));
        }
        last_id += 1;
        clauses.push(Clause { id: last_id, text: clause.text.clone() });
    }
    let bytes: usize = clauses.iter().map(|clause| clause.text.len() + size_of::<u64>()).sum();
    if bytes > MAX_PLAN {
        return Err(Refused::Bad(format!(
            "all clauses together have {bytes} bytes and may have {MAX_PLAN}; remove some"
        )));
    }
    Ok((Plan { revision, clauses, last_id }, added))
}

fn not_changed(why: String) -> Refused {
    Refused::Conflict(format!("nothing is changed: {why}"))
}
