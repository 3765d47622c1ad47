//! The forward passes of one model.

use std::collections::{HashSet, VecDeque};

use wire::tap_abi::Trigger;

use super::{
    Rule, Steps,
    together::{Made, Together},
};

/// Passes whose inputs are remembered, for gradients that come late.
const REMEMBERED: usize = 64;
/// Most forwards under way: more than Python lets modules nest.
const MAX_FORWARDS: usize = 1024;

/// Who was called from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Caller {
    /// The model itself.
    Model,
    /// A part that holds tapped modules.
    Part(u64),
    /// A tapped module that holds none.
    Tap(u32),
}

/// A place in the stack of a thread.
#[derive(Clone, Copy, Debug)]
pub struct StackPosition {
    pub(super) thread: usize,
    /// Smaller inside of calls: stacks grow downwards.
    pub(super) address: usize,
}

impl StackPosition {
    /// Where the caller is, given the address of a variable of its own.
    pub fn here<T>(local: &T) -> Self {
        thread_local!(static THREAD: u8 = const { 0 });
        let thread = THREAD.with(|t| std::ptr::from_ref(t).addr());
        Self { thread, address: std::ptr::from_ref(local).addr() }
    }
}

#[derive(Debug)]
pub(super) struct Forward {
    caller: Caller,
    position: StackPosition,
}

/// The first input of a pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Input {
    /// Its first sizes, as in [`Trigger::first`].
    pub sizes: [i64; 3],
    /// Its digest, as in [`Trigger::input_digest`].
    pub digest: u32,
}

impl Default for Input {
    fn default() -> Self {
        Self { sizes: [-1; 3], digest: 0 }
    }
}

/// The passes of one model.
#[derive(Debug, Default)]
pub struct Passes {
    pub(super) step: u64,
    /// It is one of inference: a pass of its own, numbered apart from those of training.
    pub(super) inference: bool,
    /// How many of these there were, and whether gradients were enabled in any.
    inferences: u64,
    inference_trained: bool,
    counted: [u32; 2],
    /// Passes that make a step of inference: more than one where a pipeline cuts the batch.
    pub(super) microbatches: u32,
    /// All ranks have stages of the pipeline.
    pub(super) of_all: bool,
    /// The last batch has ended, with as many passes or fewer.
    pub(super) batch_over: bool,
    pub(super) micro: u32,
    pub(super) train: bool,
    /// Of the last pass in which gradients were enabled: its number and microbatch, and whether it trains.
    pub(super) differentiable: Option<(u64, u32, bool)>,
    /// Some pass has trained.
    pub(super) has_trained: bool,
    pub(super) number: u64,
    /// Forwards under way, as far as is known.
    pub(super) forwards: Vec<Forward>,
    pub(super) grad_enabled: bool,
    called: HashSet<Caller>,
    /// Whatever is called next begins another pass.
    pub(super) is_over: bool,
    /// The part that was called first of all, if it is known: it begins passes of parts.
    pub(super) first: Option<Caller>,
    /// What the last passes were called with.
    inputs: VecDeque<(u64, Input)>,
    /// What other ranks have to know of them.
    pub(super) together: Together,
}

impl Passes {
    /// The forward of the model or of a part begins. `position` must come from one place in the code.
    pub fn enter(&mut self, steps: &mut Steps, caller: Caller, position: StackPosition, trigger: &Trigger) {
        if trigger.replay {
            return;
        }
        self.forwards.retain(|s| s.position.thread != position.thread || s.position.address > position.address);
        if self.forwards.is_empty() {
            self.begin(steps, caller, trigger);
        }
        if self.forwards.len() >= MAX_FORWARDS {
            self.forwards.remove(0);
        }
        self.forwards.push(Forward { caller, position });
    }

    /// It ends, and with it whatever began inside of it.
    pub fn exit(&mut self, caller: Caller, position: StackPosition, trigger: &Trigger) {
        if trigger.replay {
            return;
        }
        let here = |s: &Forward| s.position.thread == position.thread;
        if let Some(at) = self.forwards.iter().rposition(|s| here(s) && s.caller == caller) {
            let mut index = 0;
            self.forwards.retain(|s| {
                index += 1;
                index <= at || !here(s)
            });
        }
        if caller == Caller::Model && self.forwards.is_empty() {
            self.together.end(Some(trigger));
        }
    }

    /// No forward is under way.
    pub fn none_open(&mut self) {
        self.forwards.clear();
        self.together.end(None);
    }

    pub(super) fn begin(&mut self, steps: &mut Steps, caller: Caller, trigger: &Trigger) {
        let is_within = self.is_within_batch();
        // A pipeline has backward passes within a batch.
        let within_batch = steps.rule() == Rule::Backward && is_within;
        let inference = steps.rule() == Rule::Inference || (within_batch && self.inference);
        let step = if inference || within_batch { self.step } else { steps.begin_pass() };
        let new_step = self.number == 0 || inference != self.inference || step != self.step;
        // The model's own forward is a pass, whatever parts of it did before.
        let is_over = std::mem::take(&mut self.is_over);
        let batch_over = std::mem::take(&mut self.batch_over);
        if new_step || is_over || caller == Caller::Model || self.begins(caller) {
            let is_whole = batch_over || self.counted.iter().sum::<u32>() >= self.microbatches.max(1);
            if inference && (new_step || is_whole) {
                self.step = self.inferences;
                self.inferences += 1;
                steps.begin_inference();
                self.counted = [0, 0];
            } else if new_step {
                self.step = step;
                self.counted = self.used_by_inference(step);
            }
            self.inference = inference;
            self.called.clear();
            // A sampler or a rollout has a model in training mode too.
            self.train = trigger.train && trigger.grad_enabled;
            self.has_trained |= self.train;
            self.inference_trained |= self.train && inference;
            let [eval, train] = &mut self.counted;
            let counter = if self.train { train } else { eval };
            self.micro = *counter;
            *counter += 1;
            self.number += 1;
            self.grad_enabled = trigger.grad_enabled;
            self.inputs.push_back((self.number, Input { sizes: trigger.first, digest: trigger.input_digest }));
            if self.inputs.len() > REMEMBERED {
                self.inputs.pop_front();
            }
            let made = Made { step: self.step, micro: self.micro, train: self.train, inference };
            // All stages of a pipeline make each batch.
            let is_together = self.of_all || (is_within && self.together.was_together());
            self.together.begin(made, is_together, trigger);
        }
        self.called.insert(caller);
        self.grad_enabled |= trigger.grad_enabled;
        if self.grad_enabled {
            self.differentiable = Some((self.number, self.micro, self.train));
        }
    }

    /// Whether a call of a part, from outside, goes on with the last pass.
    pub fn goes_on(&self, callers: &[Option<Caller>]) -> bool {
        self.number > 0 && !self.is_over && !callers.iter().flatten().any(|caller| self.begins(*caller))
    }

    /// Whether a pass of parts begins with a call of this one.
    fn begins(&self, caller: Caller) -> bool {
        self.first == Some(caller) || self.called.contains(&caller)
    }

    /// Whether the next pass is one of a pipeline's batch of which some were made.
    pub fn is_within_batch(&self) -> bool {
        self.microbatches > 1 && !self.batch_over && !self.counted.iter().sum::<u32>().is_multiple_of(self.microbatches)
    }

    /// Forwards under way, as far as is known.
    pub fn forwards(&self) -> usize {
        self.forwards.len()
    }

    /// How many passes of each kind had the number of this step in inference. Those of training are other ones.
    fn used_by_inference(&self, step: u64) -> [u32; 2] {
        let some = if step < self.inferences { self.microbatches.max(1) } else { 0 };
        [some, if self.inference_trained { some } else { 0 }]
    }

    /// What the pass was called with.
    pub fn input(&self, pass: u64) -> Input {
        self.inputs.iter().find(|(n, _)| *n == pass).map_or(Input::default(), |(_, input)| *input)
    }
}
