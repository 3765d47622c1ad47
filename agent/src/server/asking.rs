//! What all ranks of a job are asked at once: which plan they have, where they are, and whether they confirm the next one.

use std::{
    collections::{BTreeMap, BTreeSet},
    os::fd::OwnedFd,
    sync::Arc,
    time::Duration,
};

use flexmodel_run::format::JobId;
use tokio::task::JoinSet;
use wire::{
    control::Question,
    revision::{Clause, Count, Moment, Plan, Since, Verdict},
};

use super::{
    Server,
    changes::Refused,
    ranks::{Answer, NoAnswer},
};
use crate::text::named_ranks;

/// How long a rank may take to say where it is.
pub const ASK: Duration = Duration::from_secs(5);
/// How long a rank that has just attached may take to say which plan it has.
const ATTACHING: Duration = Duration::from_secs(60);
/// How often it is asked again while another is about to begin, and how many times.
const LOOK: Duration = Duration::from_secs(1);
const LOOKS: u32 = 60;

/// The plan that ranks have in force.
pub struct Found {
    /// The oldest, where they have several.
    pub plan: Plan,
    /// When that began.
    pub since: Since,
    /// Which of them have which revision.
    pub having: BTreeMap<u64, BTreeSet<u32>>,
    /// The highest revision that they have heard of.
    pub heard: u64,
    /// The highest number that a clause of theirs has.
    pub last_id: u32,
    /// The highest that is yet to begin on one of them, or may be.
    pub open: Option<u64>,
}

impl Found {
    /// That ranks have different revisions, and what to do.
    pub fn differ(&self) -> String {
        let having = |(revision, ranks): (&u64, &BTreeSet<u32>)| {
            format!("{} revision {revision}", named_ranks(ranks, ["has", "have"]))
        };
        let all: Vec<String> = self.having.iter().map(having).collect();
        format!(
            "nothing is changed: {} of the hooks, since some could not hear what was decided; hooks RUN set CLAUSES gives all of \
             them the same",
            all.join(", ")
        )
    }
}

impl Server {
    /// Asks ranks the same at once. Each one's answer, or why there is none.
    async fn ask_all(
        self: &Arc<Self>,
        job: JobId,
        ranks: impl Iterator<Item = u32>,
        question: &Question,
        fd: Option<Arc<OwnedFd>>,
        limit: Duration,
    ) -> JoinSet<(u32, Result<Answer, NoAnswer>)> {
        let mut asked = JoinSet::new();
        for rank in ranks {
            let (server, question, fd) = (self.clone(), question.clone(), fd.clone());
            asked.spawn(async move { (rank, server.ranks.ask_with((job, rank), question, fd, limit).await) });
        }
        asked
    }

    /// The plan that ranks have in force.
    ///
    /// # Errors
    /// One does not answer.
    pub async fn plans(
        self: &Arc<Self>,
        job: JobId,
        ranks: impl Iterator<Item = u32>,
        limit: Duration,
    ) -> Result<Found, Refused> {
        let mut asked = self.ask_all(job, ranks, &Question::Plan, None, limit).await;
        let mut found: Option<Found> = None;
        while let Some(answer) = asked.join_next().await {
            let (rank, answer) = answer.map_err(|e| Refused::Conflict(e.to_string()))?;
            let answer = answer.map_err(|why| no_answer(rank, why))?;
            let Answer::Plan { revision, since, heard, open, clauses, ids } = answer else {
                return Err(nonsense(rank));
            };
            if clauses.is_cut() || clauses.sent() != ids.len() {
                return Err(nonsense(rank));
            }
            let before = found.take();
            let mut having = before.as_ref().map(|found| found.having.clone()).unwrap_or_default();
            let is_oldest = having.keys().all(|its| *its > revision);
            having.entry(revision).or_default().insert(rank);
            let last_id = ids.iter().copied().max().unwrap_or_default();
            let (heard, open, last_id) = match &before {
                Some(found) => (found.heard.max(heard), found.open.max(open), found.last_id.max(last_id)),
                None => (heard, open, last_id),
            };
            if let Some(before) = before.filter(|_| !is_oldest) {
                found = Some(Found { having, heard, open, last_id, ..before });
                continue;
            }
            let clause = |(id, (text, ..)): (u32, (&str, _, _))| Clause { id, text: text.to_owned() };
            let clauses = ids.into_iter().zip(clauses.iter()).map(clause).collect();
            let plan = Plan { revision, clauses, last_id };
            found = Some(Found { plan, since, having, heard, last_id, open });
        }
        found.ok_or_else(|| Refused::Conflict("no rank is attached".into()))
    }

    /// Where they are.
    ///
    /// # Errors
    /// One does not answer.
    pub async fn moments(self: &Arc<Self>, job: JobId, ranks: &BTreeSet<u32>) -> Result<Vec<Moment>, Refused> {
        let mut asked = self.ask_all(job, ranks.iter().copied(), &Question::Moment, None, ASK).await;
        let mut moments = Vec::new();
        while let Some(answer) = asked.join_next().await {
            let (rank, answer) = answer.map_err(|e| Refused::Conflict(e.to_string()))?;
            match answer.map_err(|why| no_answer(rank, why))? {
                Answer::Moment(moment) => moments.push(moment),
                _ => return Err(nonsense(rank)),
            }
        }
        Ok(moments)
    }

    /// Has ranks confirm a proposal, until there is something to be decided.
    ///
    /// # Errors
    /// One does not answer.
    pub async fn confirm(
        self: &Arc<Self>,
        job: JobId,
        ranks: &BTreeSet<u32>,
        question: &Question,
        fd: Option<Arc<OwnedFd>>,
        limit: Duration,
    ) -> Result<Count, Refused> {
        let mut asked = self.ask_all(job, ranks.iter().copied(), question, fd, limit).await;
        let mut count = Count::of(ranks.iter().copied());
        while count.verdict() == Verdict::Open {
            let Some(answer) = asked.join_next().await else { break };
            let (rank, answer) = answer.map_err(|e| Refused::Conflict(e.to_string()))?;
            match answer {
                Ok(Answer::Prepare(answer)) => count.hear(rank, answer),
                Ok(_) => return Err(nonsense(rank)),
                Err(why) => return Err(no_answer(rank, why)),
            }
        }
        Ok(count)
    }

    /// Asks a rank that has just attached for its plan: it may be one that an agent decided upon and did not live to tell of,
    /// or that another attempt began with. Names the rank where another has another revision.
    pub async fn compare_plan(self: Arc<Self>, job: JobId, rank: u32) {
        for _ in 0..LOOKS {
            let found = self.plans(job, std::iter::once(rank), ATTACHING).await;
            let Ok(Found { plan, since, open, .. }) = found else { return };
            let revision = plan.revision;
            if revision > 0 {
                self.tell(job, plan, since);
            }
            // While another is about to begin, ranks may be on either side of its step.
            if open.is_some() {
                tokio::time::sleep(LOOK).await;
                continue;
            }
            if let Some((other, its)) = self.ranks.has_revision((job, rank), revision) {
                self.board.trouble_once(&format!(
                    "rank {rank} has revision {revision} of the hooks and rank {other} has revision {its}: what they capture may \
                     not go together"
                ));
            }
            return;
        }
    }
}

fn no_answer(rank: u32, why: NoAnswer) -> Refused {
    Refused::Conflict(match why {
        NoAnswer::Absent | NoAnswer::Left => format!("nothing is changed: rank {rank} has left"),
        NoAnswer::Late => format!(
            "nothing is changed: rank {rank} does not answer: its process is stopped, or its taps are off (its own line says why)"
        ),
    })
}

fn nonsense(rank: u32) -> Refused {
    Refused::Conflict(format!("nothing is changed: rank {rank} answers what it was not asked"))
}
