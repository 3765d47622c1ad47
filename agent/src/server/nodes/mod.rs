//! Changes the hooks of a job whose ranks have several agents: what each of these does.
//!
//! All of it is decided in the job's own store, under these keys of revision `N`:
//!
//! | key | value | written by |
//! |---|---|---|
//! | `N` | the proposal, and whose it is | the agent that leads: who comes first |
//! | `N/confirmed/R` | whether the ranks of a node confirm; `R` is its lowest | the agent of these ranks |
//! | `N/verdict` | the register: commit or abandoned ([`wire::revision`]) | the leader, ranks that are there first, and agents that have waited |
//!
//! A key has one value for good. What begins something is signed with the run's key ([`key`]), for its place and its process
//! group: whoever else reaches the store can abandon a proposal and no more. Ranks know no key: their agent tells them which
//! value means commit.
//!
//! Whatever becomes of an agent, every proposal gets a verdict: a rank abandons it when it comes to where it would begin, and
//! each agent when it has waited for [`ORPHANED`].

pub mod key;
pub mod watch;

#[cfg(test)]
mod tests;

use std::{collections::BTreeSet, time::Duration};

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tokio::time::Instant;
use wire::{
    control,
    revision::Proposal,
    store::{ABANDONED, Place},
};

use super::changes::CONFIRM;
use crate::text::named_ranks;
use key::{CODE, Key};

/// After how long a proposal that its leader has not decided upon is abandoned by others.
const ORPHANED: Duration = Duration::from_secs(15);

/// What an agent reaches of a job: the ranks of its node, and through them the job's store.
pub trait Job: Sync {
    /// The ranks of this node.
    fn here(&self) -> &BTreeSet<u32>;

    /// Gives a key this value if it has none: the value that it has.
    fn settle(&self, key: String, value: Vec<u8>) -> impl Future<Output = Result<Vec<u8>, String>> + Send;

    /// The value of a key, once it has one; nothing after `limit`.
    fn wait_for(&self, key: String, limit: Duration) -> impl Future<Output = Result<Option<Vec<u8>>, String>> + Send;

    /// Has all ranks of this node confirm a proposal.
    fn prepare(&self, proposal: &Proposal, place: Place) -> impl Future<Output = Result<(), No>> + Send;
}

/// Why ranks of a node do not confirm.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum No {
    /// One of them refuses. It may take another proposal.
    Refused(String),
    /// One of them does not answer.
    Lost(String),
}

/// What the leader says.
#[derive(Debug, Serialize, Deserialize)]
struct Announced {
    by: String,
    since: u64,
    proposal: Proposal,
}

/// What the agent of other ranks says.
#[derive(Debug, Serialize, Deserialize)]
struct Confirmed {
    ranks: Vec<u32>,
    answer: Result<(), No>,
}

/// An agent, as one of several.
#[derive(Clone, Debug)]
pub struct Agent {
    /// Names it for people.
    pub name: String,
    /// When it began: tells it from one of the same name that was there before.
    pub since: u64,
    /// The run's.
    pub key: Key,
    /// The number of the job's process group.
    pub group: u64,
}

impl Agent {
    fn seal<T: Serialize>(&self, place: &str, what: &T) -> Result<Vec<u8>, String> {
        let body = control::encode(what).map_err(|e| e.to_string())?;
        let mut sealed = self.code(place, &body);
        sealed.extend_from_slice(&body);
        Ok(sealed)
    }

    /// `None`: it is not signed with this key, for this place.
    fn open<T: DeserializeOwned>(&self, place: &str, sealed: &[u8]) -> Option<T> {
        let (code, body) = sealed.split_at_checked(CODE)?;
        let texts = [place.as_bytes(), &self.group.to_le_bytes(), body];
        self.key.is_code(code, &texts).then(|| control::decode_next(&mut body.to_vec()).ok().flatten()).flatten()
    }

    fn announces(&self, proposal: Proposal) -> Announced {
        Announced { by: self.name.clone(), since: self.since, proposal }
    }

    fn code(&self, place: &str, text: &[u8]) -> Vec<u8> {
        self.key.code(&[place.as_bytes(), &self.group.to_le_bytes(), text])
    }

    /// The register of what is announced by these bytes.
    fn register(&self, revision: u64, announced: &[u8]) -> (String, Vec<u8>) {
        let key = verdict(revision);
        let commit = self.code(&key, announced);
        (key, commit)
    }

    /// The number that a proposal of this agent would have, behind `heard`.
    ///
    /// # Errors
    /// Another agent leads, or the store does not answer.
    pub async fn next<J: Job>(&self, job: &J, heard: u64) -> Result<u64, String> {
        let (mut last, mut is_new) = (heard, false);
        loop {
            let announced = job.wait_for(announced(last), Duration::ZERO).await?;
            match announced {
                None if is_new => return Ok(last),
                // What was heard of before this process group.
                None => {}
                Some(bytes) if job.wait_for(verdict(last), Duration::ZERO).await?.is_none() => {
                    return Err(self.taken(last, &bytes));
                }
                Some(_) => {}
            }
            (last, is_new) = (last + 1, true);
        }
    }

    fn taken(&self, revision: u64, announced: &[u8]) -> String {
        let by = self.open(&self::announced(revision), announced).map(|Announced { by, .. }| format!(", {by},"));
        format!(
            "another agent{} is changing the hooks (revision {revision}); try again when it is done",
            by.unwrap_or_default()
        )
    }

    /// Has all ranks of a job of `world` decide on a proposal. If it is abandoned, and may be made again, why.
    ///
    /// # Errors
    /// Why nothing is changed, or that nobody can say.
    pub async fn lead<J: Job>(&self, job: &J, world: u32, proposal: &Proposal) -> Result<Result<(), String>, String> {
        let revision = proposal.plan.revision;
        let place = announced(revision);
        let mine = self.seal(&place, &self.announces(proposal.clone()))?;
        let there = job.settle(place, mine.clone()).await?;
        if there != mine {
            return Err(self.taken(revision, &there));
        }
        let (key, commit) = self.register(revision, &mine);
        let outcome = match job.prepare(proposal, Place::Store { key: key.clone(), commit: commit.clone() }).await {
            Ok(()) => self.others(job, world, revision).await,
            Err(no) => Err(no),
        };
        let word = if outcome.is_ok() { commit.clone() } else { ABANDONED.to_vec() };
        let settled = job.settle(key, word).await;
        let begun = match settled {
            Ok(there) => there == commit,
            // Nobody begins what was not to be committed.
            Err(_) if outcome.is_err() => false,
            Err(why) => return Err(format!("nobody can say whether revision {revision} begins: {why}")),
        };
        match outcome {
            _ if begun => Ok(Ok(())),
            Ok(()) => {
                Ok(Err(format!("a rank came to step {} before all had confirmed", proposal.begins.unwrap_or_default())))
            }
            Err(No::Refused(why)) => Ok(Err(why)),
            Err(No::Lost(why)) => Err(why),
        }
    }

    /// What the ranks of all other nodes say.
    async fn others<J: Job>(&self, job: &J, world: u32, revision: u64) -> Result<(), No> {
        let end = Instant::now() + CONFIRM;
        let mut missing: BTreeSet<u32> = (0..world).filter(|rank| !job.here().contains(rank)).collect();
        // No rank of its node is below it, since all that are have confirmed.
        while let Some(&lowest) = missing.first() {
            let key = confirmed(revision, lowest);
            let left = end.saturating_duration_since(Instant::now());
            let Some(sealed) = job.wait_for(key.clone(), left).await.map_err(No::Lost)? else {
                return Err(No::Lost(format!(
                    "{} not confirmed within {} s: is there an agent on their nodes that has the key of this one, and is \
                     none of their processes stopped?",
                    named_ranks(&missing, ["has", "have"]),
                    CONFIRM.as_secs()
                )));
            };
            let Some(Confirmed { ranks, answer }) = self.open(&key, &sealed) else {
                return Err(No::Lost(format!("what is said of rank {lowest} is not signed with this agent's key")));
            };
            answer?;
            if !ranks.contains(&lowest) {
                return Err(No::Lost(format!("another node speaks for rank {lowest}")));
            }
            ranks.iter().for_each(|rank| _ = missing.remove(rank));
        }
        Ok(())
    }

    /// Has the ranks of this node decide on what was announced. The proposal, if it begins.
    ///
    /// # Errors
    /// It is none of ours, or nobody can say what became of it.
    pub async fn follow<J: Job>(&self, job: &J, revision: u64, sealed: &[u8]) -> Result<Option<Proposal>, String> {
        let said: Option<Announced> = self.open(&announced(revision), sealed);
        let Some(Announced { by, since, proposal }) = said.filter(|said| said.proposal.plan.revision == revision)
        else {
            return Err(format!("revision {revision} of the hooks is not signed with this run's key"));
        };
        let (key, commit) = self.register(revision, sealed);
        let decided = job.wait_for(key.clone(), Duration::ZERO).await?;
        if decided.is_none() && (by.as_str(), since) != (&self.name, self.since) {
            let place = Place::Store { key: key.clone(), commit: commit.clone() };
            let answer = job.prepare(&proposal, place).await;
            let lowest = job.here().first().copied().unwrap_or_default();
            let said = confirmed(revision, lowest);
            let ranks = job.here().iter().copied().collect();
            let sealed = self.seal(&said, &Confirmed { ranks, answer })?;
            job.settle(said, sealed).await?;
        }
        let verdict = match decided {
            Some(verdict) => verdict,
            None => match job.wait_for(key.clone(), ORPHANED).await? {
                Some(verdict) => verdict,
                None => job.settle(key, ABANDONED.to_vec()).await?,
            },
        };
        Ok((verdict == commit).then_some(proposal))
    }
}

/// Where a revision is announced.
pub fn announced(revision: u64) -> String {
    revision.to_string()
}

fn confirmed(revision: u64, lowest: u32) -> String {
    format!("{revision}/confirmed/{lowest}")
}

fn verdict(revision: u64) -> String {
    format!("{revision}/verdict")
}
