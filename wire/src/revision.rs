//! How the hooks of a running job change: in the same step on all ranks, or on none.
//!
//! A change is a [`Proposal`]: the whole next plan, and when it begins. Its outcome is in a [`Register`] that all ranks and
//! the leader can reach, and that says *open* until somebody changes it, once and for good:
//!
//! - The leader, an agent, sends the proposal to every rank. A rank *confirms*, before the proposal begins, or refuses
//!   ([`Ballot::prepare`]). When all have confirmed the leader changes *open* to *commit*; on a refusal, or when it has waited
//!   for too long, *open* to *abandoned*.
//! - A rank that reaches the beginning changes *open* to *abandoned* itself and obeys what it then finds
//!   ([`Ballot::decide`]). So it waits for nobody, and whoever is killed, stopped or late leaves one answer for all ranks.
//!
//! Between ranks that make passes of their own there is no common moment ([`Proposal::begins`] is `None`). Then a rank
//! changes at its next pass after *commit*.
//!
//! Nothing here does I/O or knows what a plan is: the rank's half is [`Ballot`], and the leader's [`Count`].

use std::{collections::BTreeSet, fmt};

use serde::{Deserialize, Serialize};

use crate::control::StepRule;

/// Most bytes of all clauses of a plan that is sent to a running job.
pub const MAX_PLAN: usize = 48 << 10;
/// Fewest steps from where ranks are to where a proposal begins: each has to see the one before it end.
pub const MARGIN: u64 = 2;
/// How long ranks are given before a proposal begins, in nanoseconds, as far as their steps tell.
pub const AHEAD_NS: u64 = 1_000_000_000;

/// A clause of a plan.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Clause {
    /// Its number in the job, from 1, under which it can be removed. None is given twice.
    pub id: u32,
    /// As it was written.
    pub text: String,
}

/// A plan, as it is told to a rank.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// Which of a job's plans it is; the environment's is 0.
    pub revision: u64,
    /// In the order in which they were given.
    pub clauses: Vec<Clause>,
    /// The highest number that a clause of the job ever had.
    pub last_id: u32,
}

/// Where a rank is. What is counted depends on the rule: steps, or until there are any the passes of all models.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moment {
    /// What is counted.
    pub rule: StepRule,
    /// The step, or the pass, that a pass which began now would be in.
    pub next: u64,
    /// Nanoseconds from one to the next, as far as was seen; 0: not yet.
    pub pace_ns: u64,
    /// The last pass was one of several ranks together, or steps are counted.
    pub together: bool,
}

/// When a plan began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Since {
    /// What `begins` counts.
    pub rule: StepRule,
    /// The step, or pass, that it began with; `None`: on each rank with another pass.
    pub begins: Option<u64>,
}

/// The next plan of a job.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Proposal {
    /// The plan, with a number that no proposal had before.
    pub plan: Plan,
    /// The revision that it takes the place of; `None`: of any, where nothing of that is left.
    pub base: Option<u64>,
    /// What `begins` counts.
    pub rule: StepRule,
    /// The step, or pass, that it begins with; `None`: with each rank's next pass.
    pub begins: Option<u64>,
}

/// What a register says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nobody has decided.
    Open,
    /// The proposal begins.
    Commit,
    /// It never does.
    Abandoned,
}

/// One word that the leader and all ranks can reach. It is changed by compare-and-set alone, from *open*, and so once.
pub trait Register: Send + fmt::Debug {
    /// Changes *open* to `verdict`; what it says then. `None`: it cannot be reached in time.
    fn settle(&self, verdict: Verdict) -> Option<Verdict>;

    /// What it says, without a wait: *open* where that is not known.
    fn peek(&self) -> Verdict;
}

/// What a rank that has come to where a proposal begins does.
#[derive(Debug, PartialEq, Eq)]
pub enum Decided<P> {
    /// The plan in force stays.
    Stays,
    /// It stays, since the register cannot be reached: other ranks may do otherwise.
    Unreachable(u64),
    /// The proposed plan takes its place.
    Replaced(P, Since),
}

/// A rank's half: the proposal that is open, if any. `P` is the plan in the rank's own form.
#[derive(Debug)]
pub struct Ballot<P> {
    /// The highest revision that was heard of.
    heard: u64,
    open: Option<Open<P>>,
}

#[derive(Debug)]
struct Open<P> {
    revision: u64,
    rule: StepRule,
    begins: Option<u64>,
    plan: P,
    register: Box<dyn Register>,
}

impl<P> Default for Ballot<P> {
    fn default() -> Self {
        Self { heard: 0, open: None }
    }
}

impl<P> Ballot<P> {
    /// The highest revision that this rank has heard of.
    pub fn heard(&self) -> u64 {
        self.heard
    }

    /// The revision that is proposed, or has not begun yet.
    pub fn open(&self) -> Option<u64> {
        self.open.as_ref().map(|open| open.revision)
    }

    /// A plan is in force without a proposal.
    pub fn begins_with(&mut self, revision: u64) {
        self.heard = self.heard.max(revision);
    }

    /// Confirms a proposal: from now on it begins here too, if its register says so. One that is older is abandoned for it.
    ///
    /// # Errors
    /// Why it is refused, as a sentence about this rank.
    pub fn prepare(
        &mut self,
        in_force: u64,
        now: Moment,
        proposal: &Proposal,
        plan: P,
        register: Box<dyn Register>,
    ) -> Result<(), String> {
        let revision = proposal.plan.revision;
        if revision <= self.heard {
            return Err(format!("has heard of revision {} already", self.heard));
        }
        if let Some(open) = &self.open {
            if open.register.settle(Verdict::Abandoned) != Some(Verdict::Abandoned) {
                return Err(format!("is about to begin revision {}", open.revision));
            }
            self.open = None;
        }
        if let Some(base) = proposal.base.filter(|base| *base != in_force) {
            return Err(format!(
                "has revision {in_force} in force, not {base}; hooks RUN set CLAUSES gives all ranks the same"
            ));
        }
        if proposal.rule != now.rule {
            return Err("counts its steps otherwise than the other ranks just now".into());
        }
        if proposal.begins.is_some_and(|begins| now.next >= begins) {
            return Err(format!("is past step {} already", proposal.begins.unwrap_or_default()));
        }
        self.heard = revision;
        self.open = Some(Open { revision, rule: proposal.rule, begins: proposal.begins, plan, register });
        Ok(())
    }

    /// Whether the next pass of this rank is one that a proposal begins with, or does not begin with any more.
    pub fn is_due(&self, now: Moment) -> bool {
        self.open.as_ref().is_some_and(|open| match open.begins {
            // Whatever is counted now, no pass will have the number that was meant.
            _ if open.rule != now.rule => true,
            Some(begins) => now.next >= begins,
            None => open.register.peek() != Verdict::Open,
        })
    }

    /// Whether the next pass is one that a proposal begins with on all ranks: it must not begin undecided.
    pub fn must_decide(&self, now: Moment) -> bool {
        self.open.as_ref().is_some_and(|open| open.begins.is_some()) && self.is_due(now)
    }

    /// What the next pass begins with, if one is due.
    pub fn decide(&mut self, now: Moment) -> Decided<P> {
        if !self.is_due(now) {
            return Decided::Stays;
        }
        let Some(open) = self.open.take() else { return Decided::Stays };
        match open.register.settle(Verdict::Abandoned) {
            Some(Verdict::Commit) => Decided::Replaced(open.plan, Since { rule: open.rule, begins: open.begins }),
            Some(_) => Decided::Stays,
            None => Decided::Unreachable(open.revision),
        }
    }
}

/// The leader's half: which ranks have confirmed.
#[derive(Debug)]
pub struct Count {
    missing: BTreeSet<u32>,
    refused: Option<(u32, String)>,
}

impl Count {
    /// Of these ranks.
    pub fn of(ranks: impl IntoIterator<Item = u32>) -> Self {
        Self { missing: ranks.into_iter().collect(), refused: None }
    }

    /// A rank has answered: it confirms, or says why not.
    pub fn hear(&mut self, rank: u32, answer: Result<(), String>) {
        match answer {
            Ok(()) => _ = self.missing.remove(&rank),
            Err(why) => _ = self.refused.get_or_insert((rank, why)),
        }
    }

    /// What is to be decided; *open*: nothing yet.
    pub fn verdict(&self) -> Verdict {
        match (&self.refused, self.missing.is_empty()) {
            (Some(_), _) => Verdict::Abandoned,
            (None, true) => Verdict::Commit,
            (None, false) => Verdict::Open,
        }
    }

    /// The first refusal.
    pub fn refusal(&self) -> Option<(u32, &str)> {
        self.refused.as_ref().map(|(rank, why)| (*rank, why.as_str()))
    }

    /// Ranks that have not answered.
    pub fn missing(&self) -> &BTreeSet<u32> {
        &self.missing
    }
}

/// The step that a proposal begins with, for some ranks of a job of `world`: about a second ahead, times `patience`.
/// `Ok(None)`: ranks make passes of their own, and there is none.
///
/// # Errors
/// Ranks count differently, or have not begun.
pub fn beginning(ranks: &[Moment], world: u32, patience: u64) -> Result<Option<u64>, String> {
    let Some(first) = ranks.first() else { return Err("there is no rank".into()) };
    if ranks.iter().any(|moment| moment.rule != first.rule) {
        return Err("ranks count their steps by different rules just now; try again in the next step".into());
    }
    if world > 1 && ranks.iter().any(|moment| !moment.together) {
        // Some may be in their first pass, of which nobody knows yet what it is.
        let begun = ranks.iter().all(|moment| moment.next > 0);
        return if begun { Ok(None) } else { Err("not every rank has made its first pass; try again after it".into()) };
    }
    let next = ranks.iter().map(|moment| moment.next).max().unwrap_or_default();
    let fastest = ranks.iter().map(|moment| moment.pace_ns).filter(|pace| *pace > 0).min();
    let second = fastest.map_or(0, |pace| AHEAD_NS.div_ceil(pace));
    Ok(Some(next.saturating_add(second.max(MARGIN).saturating_mul(patience))))
}

#[cfg(test)]
mod tests;
