//! Follows what other agents decide on the hooks of a job, as long as ranks of it are attached here.

use std::{
    collections::BTreeSet,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use flexmodel_run::format::JobId;
use wire::{
    control::Question,
    revision::Proposal,
    store::{Place, StoreOp},
};

use super::{Agent, Job, No, announced, key::Source};
use crate::server::{
    Server,
    board::now_ns,
    changes::{CONFIRM, Refused},
    ranks::{Answer, NoAnswer},
};

/// How long a rank may take to have something done in the store.
const ASK: Duration = Duration::from_secs(5);
/// How long one question waits for what comes next.
const NEXT: Duration = Duration::from_secs(10);
/// Before it is asked again, where nobody could answer.
const PAUSE: Duration = Duration::from_secs(1);

/// What an agent knows of being one of several.
#[derive(Debug)]
pub struct Nodes {
    source: Source,
    name: String,
    since: u64,
    watched: Mutex<BTreeSet<JobId>>,
    /// Its ranks' hooks are not to be changed.
    read_only: bool,
}

impl Nodes {
    /// Of an agent whose run is in this folder of several nodes' runs, if it is, and of whose ranks no hooks are changed where
    /// it is `read_only`.
    pub fn new(folder: Option<PathBuf>, read_only: bool) -> Self {
        let name = format!("that of node {} (process {})", wire::env::node(), std::process::id());
        Self { source: Source::new(folder), name, since: now_ns(), watched: Mutex::default(), read_only }
    }

    fn begins(&self, job: JobId) -> bool {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner).insert(job)
    }

    fn ends(&self, job: JobId) {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner).remove(&job);
    }
}

/// A job as it is reached through the ranks that are attached.
pub struct Attached {
    server: Arc<Server>,
    job: JobId,
    here: BTreeSet<u32>,
}

impl Attached {
    /// The ranks of its process group that are on this node are these.
    pub fn new(server: Arc<Server>, job: JobId, here: BTreeSet<u32>) -> Self {
        Self { server, job, here }
    }

    fn attached(&self) -> BTreeSet<u32> {
        self.server.ranks.by_job().remove(&self.job).unwrap_or_default()
    }

    /// By the lowest rank that answers: what is done twice in the store is done once. Where two do not answer, no third is asked.
    async fn in_store(&self, op: StoreOp, limit: Duration) -> Result<Option<Vec<u8>>, String> {
        let mut why = "no rank is attached".to_owned();
        for rank in self.attached().into_iter().take(2) {
            match self.server.ranks.ask((self.job, rank), Question::Store(op.clone()), limit).await {
                Ok(Answer::Store(found)) => return found,
                Ok(_) => why = format!("rank {rank} answers what it was not asked"),
                Err(NoAnswer::Absent | NoAnswer::Left) => why = format!("rank {rank} has left"),
                Err(NoAnswer::Late) => why = format!("rank {rank} does not answer; is its process stopped?"),
            }
        }
        Err(why)
    }
}

impl Job for Attached {
    fn here(&self) -> &BTreeSet<u32> {
        &self.here
    }

    async fn settle(&self, key: String, value: Vec<u8>) -> Result<Vec<u8>, String> {
        let there = self.in_store(StoreOp::Settle { key, value }, ASK).await?;
        there.ok_or_else(|| "a rank answers nothing".into())
    }

    async fn wait_for(&self, key: String, limit: Duration) -> Result<Option<Vec<u8>>, String> {
        let limit_ms = limit.as_millis().try_into().unwrap_or(u32::MAX);
        self.in_store(StoreOp::WaitFor { key, limit_ms }, limit + ASK).await
    }

    async fn prepare(&self, proposal: &Proposal, place: Place) -> Result<(), No> {
        let nodes = &self.server.nodes;
        if nodes.read_only {
            return Err(No::Lost(format!("an agent, {}, was started with --read-only", nodes.name)));
        }
        let attached = self.attached();
        if let Some(rank) = self.here.iter().find(|rank| !attached.contains(rank)) {
            return Err(No::Lost(format!("rank {rank} is not attached to its agent")));
        }
        let question = Question::Prepare(proposal.clone(), place);
        match self.server.confirm(self.job, &self.here, &question, None, CONFIRM / 2).await {
            Ok(count) => match count.refusal() {
                Some((rank, why)) => Err(No::Refused(format!("rank {rank} {why}"))),
                None => Ok(()),
            },
            Err(Refused::Bad(why) | Refused::Conflict(why)) => Err(No::Lost(why)),
        }
    }
}

impl Server {
    /// This agent as one of a job's; `make`: also where their run has no key yet.
    ///
    /// # Errors
    /// There is no key.
    pub fn as_one_of_several(&self, job: JobId, make: bool) -> Result<Agent, String> {
        let key = self.nodes.source.key(make)?;
        Ok(Agent { name: self.nodes.name.clone(), since: self.nodes.since, key, group: self.jobs.group(job) })
    }

    /// Follows the other agents of a job that has ranks elsewhere, until its last rank here has left.
    pub async fn watch(self: Arc<Self>, job: JobId) {
        if self.jobs.group(job) == 0 {
            return;
        }
        // A rank may come while the last one leaves.
        while self.elsewhere(job).is_some() && self.is_attached(job) && self.nodes.begins(job) {
            self.follow_all(job).await;
            self.nodes.ends(job);
        }
    }

    fn is_attached(&self, job: JobId) -> bool {
        self.ranks.by_job().contains_key(&job)
    }

    async fn follow_all(self: &Arc<Self>, job: JobId) {
        let mut next = self.changes.in_force(job.job).map_or(0, |plan| plan.revision) + 1;
        // Ranks may come to be on this node.
        while let Some(here) = self.elsewhere(job) {
            let of = Attached::new(self.clone(), job, here);
            match of.wait_for(announced(next), NEXT).await {
                Ok(Some(sealed)) => {
                    // What became of one is learned, unless it is none of ours, or until there is another.
                    let is_known = self.follow(&of, next, &sealed).await;
                    if is_known || of.wait_for(announced(next + 1), PAUSE).await.is_ok_and(|next| next.is_some()) {
                        next += 1;
                    }
                }
                Ok(None) => {}
                Err(_) if !self.is_attached(job) => return,
                Err(_) => tokio::time::sleep(PAUSE).await,
            }
        }
    }

    /// Whether it is known what became of a revision.
    async fn follow(&self, of: &Attached, revision: u64, sealed: &[u8]) -> bool {
        let outcome = match self.as_one_of_several(of.job, false) {
            Ok(agent) => agent.follow(of, revision, sealed).await,
            Err(why) => Err(format!("another agent is changing the hooks (revision {revision}): {why}")),
        };
        let is_known = outcome.is_ok();
        match outcome {
            Ok(Some(proposal)) => _ = self.changed(of.job, self.jobs.world(of.job), proposal),
            Ok(None) => {}
            Err(why) => self.board.trouble_once(&why),
        }
        is_known
    }

    /// The ranks of a job that are on this node, if it has others elsewhere and that is known.
    pub fn elsewhere(&self, job: JobId) -> Option<BTreeSet<u32>> {
        self.jobs.here(job).filter(|here| here.len() < self.jobs.world(job) as usize)
    }
}
