//! The steps of a job, and by which rule they end.

use std::collections::{HashMap, HashSet};

use wire::control::StepRule as Rule;

/// Sets of optimizers for which turns are counted before it is seen which of them hold something.
const MANY: usize = 64;

/// The steps of a job that trains. While it does not, its models count their passes themselves.
#[derive(Debug, Default)]
pub struct Steps {
    now: u64,
    rule: Rule,
    /// The step ends with the next pass.
    ended: bool,
    /// Optimizers that have stepped in this one.
    stepped: HashSet<u32>,
    /// In how many steps any of some optimizers has stepped, by their numbers.
    turns: HashMap<Vec<u32>, u64>,
    /// Steps of inference that all models have begun together.
    inferences: u64,
}

impl Steps {
    /// The step under way.
    pub fn now(&self) -> u64 {
        self.now
    }

    /// By what rule it will end.
    pub fn rule(&self) -> Rule {
        self.rule
    }

    /// The process made an optimizer: from now on these end steps.
    pub fn optimizer_made(&mut self) {
        self.rule = Rule::Optimizer;
    }

    /// An optimizer stepped or was skipped. One that nobody saw being made shows that the job trains: step `last` did.
    pub fn optimizer_stepped(&mut self, optimizer: u32, last: u64) {
        if self.rule == Rule::Inference {
            self.now = last;
        }
        self.rule = Rule::Optimizer;
        self.ended = true;
        self.stepped.insert(optimizer);
    }

    /// A backward pass ended. The first one shows that the job trains: its pass was step `last` of its model.
    pub fn backward_ended(&mut self, last: u64) {
        match self.rule {
            Rule::Inference => {
                self.rule = Rule::Backward;
                self.now = last;
                self.ended = true;
            }
            Rule::Backward => self.ended = true,
            Rule::Optimizer => {}
        }
    }

    /// A pass begins in a job that trains: its step.
    pub fn begin_pass(&mut self) -> u64 {
        if std::mem::take(&mut self.ended) {
            self.now += 1;
            for (optimizers, turn) in &mut self.turns {
                *turn += u64::from(optimizers.iter().any(|optimizer| self.stepped.contains(optimizer)));
            }
            self.stepped.clear();
        }
        self.now
    }

    /// A model begins a step of inference.
    pub fn begin_inference(&mut self) {
        self.inferences += 1;
    }

    /// The number of the next step to begin, and of what is counted: in inference, of the steps of all models together.
    /// `within`: the next pass is one of a batch whose first is made.
    pub fn next(&self, within: bool) -> u64 {
        match self.rule {
            Rule::Inference => self.inferences - u64::from(within).min(self.inferences),
            Rule::Optimizer => self.now + u64::from(self.ended),
            Rule::Backward => self.now + u64::from(self.ended && !within),
        }
    }

    /// From now on it is counted in how many steps any of these optimizers steps. Whether it is counted for many.
    pub fn count_turns(&mut self, optimizers: &[u32]) -> bool {
        if !optimizers.is_empty() {
            // From the step that the next pass is in.
            let counted = optimizers.iter().any(|optimizer| self.stepped.contains(optimizer));
            let next = self.now + u64::from(self.ended && !counted);
            self.turns.entry(optimizers.to_vec()).or_insert(next);
        }
        self.turns.len() > MANY
    }

    /// It is not counted any more for optimizers that hold nothing.
    pub fn forget_turns(&mut self, hold: impl Fn(&[u32]) -> bool) {
        self.turns.retain(|optimizers, _| hold(optimizers));
    }

    /// What [`turn`](Self::turn) may be in the step under way.
    pub fn all_turns(&self) -> impl Iterator<Item = u64> {
        std::iter::once(self.now).chain(self.turns.values().copied())
    }

    /// In how many steps any of these optimizers has stepped: where several step in turn, fewer than there were.
    pub fn turn(&self, optimizers: &[u32]) -> u64 {
        self.turns.get(optimizers).copied().unwrap_or(self.now)
    }
}
