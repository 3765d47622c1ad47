use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

use proptest::prelude::*;

use super::*;

/// A register, as one process reaches it while nothing is in the way.
#[derive(Clone, Debug)]
struct Word {
    verdict: Arc<Mutex<Verdict>>,
    silent: Arc<AtomicBool>,
}

impl Word {
    fn open() -> Self {
        Self { verdict: Arc::new(Mutex::new(Verdict::Open)), silent: Arc::default() }
    }

    /// The same, as another process reaches it.
    fn reached_by(&self, silent: &Arc<AtomicBool>) -> Self {
        Self { verdict: self.verdict.clone(), silent: silent.clone() }
    }
}

impl Register for Word {
    fn settle(&self, verdict: Verdict) -> Option<Verdict> {
        if self.silent.load(Ordering::Relaxed) {
            return None;
        }
        let mut word = self.verdict.lock().unwrap();
        if *word == Verdict::Open {
            *word = verdict;
        }
        Some(*word)
    }

    fn peek(&self) -> Verdict {
        if self.silent.load(Ordering::Relaxed) { Verdict::Open } else { *self.verdict.lock().unwrap() }
    }
}

#[derive(Debug)]
struct Unreachable;

impl Register for Unreachable {
    fn settle(&self, _: Verdict) -> Option<Verdict> {
        None
    }

    fn peek(&self) -> Verdict {
        Verdict::Open
    }
}

fn at(next: u64) -> Moment {
    Moment { rule: StepRule::Optimizer, next, pace_ns: 0, together: true }
}

fn proposal(revision: u64, base: u64, begins: Option<u64>) -> Proposal {
    Proposal { plan: Plan { revision, ..Plan::default() }, base: Some(base), rule: StepRule::Optimizer, begins }
}

const fn since(begins: Option<u64>) -> Since {
    Since { rule: StepRule::Optimizer, begins }
}

#[test]
fn a_rank_obeys_what_the_register_says_when_it_gets_there() {
    for (settled, then) in [
        (Verdict::Commit, Decided::Replaced("new", since(Some(7)))),
        (Verdict::Abandoned, Decided::Stays),
        (Verdict::Open, Decided::Stays),
    ] {
        let (mut ballot, word) = (Ballot::default(), Word::open());
        ballot.prepare(0, at(5), &proposal(1, 0, Some(7)), "new", Box::new(word.clone())).unwrap();
        assert_eq!(ballot.decide(at(6)), Decided::Stays);
        assert_eq!((ballot.open().is_some(), word.peek()), (true, Verdict::Open), "it is not there yet");
        word.settle(settled);
        assert_eq!(ballot.decide(at(7)), then);
        let last = if settled == Verdict::Open { Verdict::Abandoned } else { settled };
        assert_eq!((ballot.open().is_some(), word.peek()), (false, last));
        assert_eq!(ballot.decide(at(7)), Decided::Stays);
    }
}

#[test]
fn without_a_common_step_a_rank_changes_once_it_is_decided() {
    let (mut ballot, word) = (Ballot::default(), Word::open());
    ballot.prepare(0, at(5), &proposal(1, 0, None), "new", Box::new(word.clone())).unwrap();
    assert!(!ballot.is_due(at(900)) && word.peek() == Verdict::Open, "it waits for nobody, and abandons nothing");
    word.settle(Verdict::Commit);
    assert!(ballot.is_due(at(901)) && !ballot.must_decide(at(901)), "any pass will do");
    assert_eq!(ballot.decide(at(901)), Decided::Replaced("new", since(None)));
}

#[test]
fn a_rank_says_why_it_does_not_confirm() {
    let mut ballot = Ballot::default();
    let mut refuses = |in_force, now, proposal: Proposal| {
        ballot.prepare(in_force, now, &proposal, (), Box::new(Word::open())).unwrap_err()
    };
    assert!(refuses(0, at(7), proposal(1, 0, Some(7))).contains("past step 7"));
    assert!(refuses(2, at(3), proposal(3, 1, Some(7))).contains("revision 2 in force, not 1"));
    let any = Proposal { base: None, ..proposal(1, 0, Some(7)) };
    assert!(refuses(9, at(7), any).contains("past step 7"), "and not for what it has in force");
    let inference = Moment { rule: StepRule::Inference, ..at(3) };
    assert!(refuses(0, inference, proposal(1, 0, Some(7))).contains("otherwise"));
    let word = Word::open();
    ballot.prepare(0, at(3), &proposal(4, 0, Some(7)), (), Box::new(word.clone())).unwrap();
    let mut again = |revision| ballot.prepare(0, at(3), &proposal(revision, 0, Some(9)), (), Box::new(Word::open()));
    assert!(again(4).unwrap_err().contains("heard of revision 4"));
    // Whose leader is gone: it is abandoned for the next one.
    again(5).unwrap();
    assert_eq!(word.peek(), Verdict::Abandoned);
}

#[test]
fn a_decision_that_waits_for_its_step_is_not_abandoned_for_another() {
    let (mut ballot, word) = (Ballot::default(), Word::open());
    ballot.prepare(0, at(3), &proposal(1, 0, Some(7)), "first", Box::new(word.clone())).unwrap();
    word.settle(Verdict::Commit);
    let next = ballot.prepare(0, at(3), &proposal(2, 0, Some(8)), "second", Box::new(Word::open()));
    assert!(next.unwrap_err().contains("about to begin revision 1"));
    assert_eq!(ballot.decide(at(7)), Decided::Replaced("first", since(Some(7))));
}

#[test]
fn a_register_out_of_reach_and_a_rule_that_changed_begin_nothing_unasked() {
    let mut ballot = Ballot::default();
    ballot.prepare(0, at(3), &proposal(1, 0, Some(7)), "new", Box::new(Unreachable)).unwrap();
    assert_eq!(ballot.decide(at(7)), Decided::Unreachable(1));
    let word = Word::open();
    ballot.prepare(0, at(3), &proposal(2, 0, Some(7)), "new", Box::new(word.clone())).unwrap();
    let other = Moment { rule: StepRule::Backward, ..at(4) };
    assert!(ballot.is_due(other), "no step has the number that was meant");
    assert_eq!((ballot.decide(other), word.peek()), (Decided::Stays, Verdict::Abandoned));
}

#[test]
fn a_proposal_begins_about_a_second_ahead_of_the_foremost_rank() {
    let moment = |next, pace_ns, together| Moment { pace_ns, together, ..at(next) };
    assert_eq!(beginning(&[moment(5, 0, true), moment(6, 0, true)], 2, 1), Ok(Some(8)));
    assert_eq!(beginning(&[moment(5, 10_000_000, true), moment(6, 20_000_000, true)], 2, 1), Ok(Some(106)));
    assert_eq!(beginning(&[moment(5, 10_000_000, true)], 1, 4), Ok(Some(405)));
    assert_eq!(beginning(&[moment(5, 60_000_000_000, true)], 1, 1), Ok(Some(7)));
    assert_eq!(beginning(&[moment(5, 0, false), moment(9, 0, true)], 2, 1), Ok(None));
    assert_eq!(beginning(&[moment(5, 0, false)], 1, 1), Ok(Some(7)), "a process alone needs nobody");
    assert_eq!(beginning(&[moment(5, 0, false)], 2, 1), Ok(None), "another rank is elsewhere");
    assert!(beginning(&[moment(0, 0, false), moment(1, 0, true)], 2, 1).is_err(), "its first pass may train");
    let other = Moment { rule: StepRule::Inference, ..at(0) };
    assert!(beginning(&[at(5), other], 2, 1).is_err() && beginning(&[], 2, 1).is_err());
}

/// An agent that changes the hooks, as far as it got.
struct Leader {
    revision: u64,
    count: Count,
    word: Word,
}

/// A rank that runs steps.
#[derive(Default)]
struct Rank {
    next: u64,
    in_force: u64,
    ballot: Ballot<u64>,
    /// Proposals on their way to it.
    inbox: VecDeque<(Proposal, Word)>,
    is_stopped: bool,
    /// The store says nothing to it.
    silent: Arc<AtomicBool>,
    /// It could not know what began, and has said so.
    is_astray: bool,
}

impl Rank {
    /// Runs one step; under which revision.
    fn step(&mut self) -> u64 {
        match self.ballot.decide(at(self.next)) {
            Decided::Replaced(revision, _) => (self.in_force, self.is_astray) = (revision, false),
            Decided::Unreachable(_) => self.is_astray = true,
            Decided::Stays => {}
        }
        self.next += 1;
        self.in_force
    }
}

/// A job, its agent, and all that was seen.
#[derive(Default)]
struct World {
    ranks: Vec<Rank>,
    /// Ranks make passes of their own.
    apart: bool,
    leader: Option<Leader>,
    /// Answers on their way: of which revision, from whom, and what.
    answers: VecDeque<(u64, u32, Result<(), String>)>,
    /// What whoever gave a command was told, by revision: from which step on it holds.
    told: BTreeMap<u64, Option<u64>>,
    begins: BTreeMap<u64, u64>,
    /// The revision of each step, and all that were in force.
    steps: BTreeMap<u64, u64>,
    seen: BTreeSet<u64>,
}

impl World {
    fn of(ranks: usize, apart: bool) -> Self {
        Self { ranks: (0..ranks).map(|_| Rank::default()).collect(), apart, ..Self::default() }
    }

    /// A command comes. A leader that was at something is dead by now; the next one asks the ranks, and not all may answer.
    fn propose(&mut self, lost: usize, ahead: u64, stale: u64, anew: bool) {
        let heard = self.ranks.iter().map(|rank| rank.ballot.heard()).max().unwrap_or(0);
        let revision = 1 + heard.max(self.begins.keys().max().copied().unwrap_or_default());
        let base = (!anew).then(|| self.ranks[0].in_force);
        let moments: Vec<Moment> = self.ranks.iter().map(|rank| at(rank.next.saturating_sub(stale))).collect();
        let Ok(Some(begins)) = beginning(&moments, moments.len() as u32, ahead) else { return };
        let word = Word::open();
        for (number, rank) in self.ranks.iter_mut().enumerate() {
            if number != lost {
                let proposal = proposal(revision, 0, (!self.apart).then_some(begins));
                rank.inbox.push_back((Proposal { base, ..proposal }, word.reached_by(&rank.silent)));
            }
        }
        self.begins.insert(revision, begins);
        self.leader = Some(Leader { revision, count: Count::of(0..self.ranks.len() as u32), word });
    }

    fn hear(&mut self, number: usize) {
        let rank = &mut self.ranks[number];
        if let Some((proposal, word)) = rank.inbox.pop_front().filter(|_| !rank.is_stopped) {
            let now = at(rank.next);
            let revision = proposal.plan.revision;
            let answer = rank.ballot.prepare(rank.in_force, now, &proposal, revision, Box::new(word));
            self.answers.push_back((revision, number as u32, answer));
        }
    }

    fn step(&mut self, number: usize) -> Result<(), TestCaseError> {
        let rank = &mut self.ranks[number];
        if !rank.is_stopped {
            let step = rank.next;
            let revision = rank.step();
            self.seen.insert(revision);
            if !rank.is_astray && !self.apart {
                let of_step = *self.steps.entry(step).or_insert(revision);
                prop_assert_eq!(of_step, revision, "two revisions in step {}", step);
            }
        }
        Ok(())
    }

    /// The leader hears an answer, or has waited for long enough, and tells whoever gave the command.
    fn decide(&mut self, late: bool) {
        let Some(leader) = &mut self.leader else { return };
        if let Some((_, rank, answer)) = self.answers.pop_front().filter(|(of, ..)| *of == leader.revision) {
            leader.count.hear(rank, answer);
        }
        let verdict = match leader.count.verdict() {
            Verdict::Open if late => Verdict::Abandoned,
            verdict => verdict,
        };
        if verdict != Verdict::Open {
            let holds = leader.word.settle(verdict) == Some(Verdict::Commit);
            self.told.insert(leader.revision, holds.then(|| self.begins[&leader.revision]));
            self.leader = None;
        }
    }

    /// The job is started again: its ranks hear what was in force, of which the agent knows what it has told.
    fn restart(&mut self) {
        let committed = |(revision, told): (&u64, &Option<u64>)| told.map(|_| *revision);
        let in_force = self.told.iter().filter_map(committed).max().unwrap_or_default();
        for rank in &mut self.ranks {
            *rank = Rank { in_force, ..Rank::default() };
            rank.ballot.begins_with(in_force);
        }
        (self.leader, self.steps) = (None, BTreeMap::new());
        self.answers.clear();
        // Of ranks that are gone.
        self.told.retain(|_, told| told.is_none());
        self.told.insert(in_force, Some(0));
    }
}

proptest! {
    /// Messages are late, lost and out of order between ranks; agents die and are followed; ranks stop for ever, go at a pace
    /// of their own, lose the store, and are started again.
    #[test]
    fn no_step_has_two_revisions_and_who_was_told_was_told_the_truth(
        ranks in 1usize..5,
        apart: bool,
        events in proptest::collection::vec((0u8..18, 0usize..5, 0u64..4), 1..400),
    ) {
        let mut world = World::of(ranks, apart);
        for (event, which, amount) in events {
            let number = which % ranks;
            match event {
                0..=5 => world.step(number)?,
                6..=9 => world.hear(number),
                10..=11 => world.decide(false),
                12 => world.decide(true),
                13 if world.leader.is_none() || amount == 0 => world.propose(usize::MAX, 1 + amount, amount, which == 0),
                14 if amount == 0 => world.propose(number, 1, 0, false),
                15 if amount == 3 && which == 4 => world.ranks[number].is_stopped = true,
                16 if amount < 2 => world.ranks[number].silent.store(amount == 0, Ordering::Relaxed),
                17 if amount == 0 && which == 0 => world.restart(),
                _ => {}
            }
        }
        // Whoever gave a command has an answer; then everybody goes on for a while, and hears nothing more.
        world.decide(true);
        prop_assert!(world.leader.is_none());
        for rank in &world.ranks {
            rank.silent.store(false, Ordering::Relaxed);
        }
        let last = world.ranks.iter().map(|rank| rank.next).chain(world.begins.values().copied()).max().unwrap_or_default() + 2;
        for number in 0..ranks {
            while world.ranks[number].next <= last && !world.ranks[number].is_stopped {
                world.step(number)?;
            }
        }
        let newest = world.told.iter().filter_map(|(revision, told)| told.map(|_| *revision)).max();
        for (revision, told) in &world.told {
            match told {
                None => prop_assert!(!world.seen.contains(revision), "revision {} was abandoned", revision),
                Some(begins) => {
                    let early = world.steps.iter().any(|(step, in_force)| step < begins && in_force == revision);
                    prop_assert!(!early, "before its step");
                    prop_assert!(world.steps.get(begins).is_none_or(|in_force| in_force == revision));
                }
            }
        }
        // Of what was decided, no rank is left behind but those that were stopped or have said so.
        for rank in world.ranks.iter().filter(|rank| !rank.is_stopped && !rank.is_astray) {
            prop_assert!(rank.in_force >= newest.unwrap_or_default());
        }
    }
}
