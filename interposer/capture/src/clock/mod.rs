//! Counts steps, microbatches, passes, calls and replays: which forward pass a tap is triggered in.
//!
//! - A *step* begins with the first forward pass after an optimizer stepped, however many optimizers did in between; in a
//!   process that has made no optimizer, after a backward pass. Until there was one or the other, each pass of a model is
//!   a step of its own.
//! - A *microbatch* is an outermost forward pass of the model within the step, counted apart for training passes and
//!   others. One trains where gradients were enabled when the model was called and some module of it was in training
//!   mode, and all that happens in it does, whatever mode a module of it is in. Where a script calls submodules directly,
//!   a pass ends when one of them is called again.
//! - *Outermost* is known from forwards under way: the model says when its forward begins and ends; where its parts are
//!   called directly, so does every module that holds a tapped one. An end may be missing (the forward raised). A call that
//!   is under way stands further up its thread's stack than one that begins inside of it, so what does not is over.
//! - A *call* counts a module's calls within a microbatch.
//! - A *replay* is a forward inside a backward pass: activation checkpointing. It is no pass of its own. Where the
//!   first forward ran without gradients (reentrant checkpointing), the replay carries the gradients, and takes the
//!   identity of the oldest pass that still waits for them, last call first.

mod calls;
mod passes;
mod steps;
mod together;

#[cfg(test)]
mod tests;

use std::collections::HashMap;

use wire::{
    control::StepRule as Rule,
    tap_abi::{Call, Trigger},
};

use passes::Passes;

pub use calls::Calls;
pub use passes::{Caller, Input, StackPosition};
pub use steps::Steps;
pub use together::{Ended, Made};

/// When a tap is triggered, and how it is triggered.
#[derive(Clone, Copy, Debug)]
pub struct Triggered<'a> {
    /// The tap.
    pub tap: u32,
    /// It is triggered before *and* after the forward, so that both get the same answer.
    pub paired: bool,
    /// Some clause of it wants gradients.
    pub wants_gradients: bool,
    /// The optimizers that hold the parameters of its module.
    pub optimizers: &'a [u32],
    /// As the bridge sees it.
    pub trigger: &'a Trigger,
}

/// The clock of a job: its steps, and the passes of each model, by the shim's serial.
#[derive(Debug, Default)]
pub struct Clock {
    steps: Steps,
    models: HashMap<u64, Passes>,
    /// Of the last batch that a pipeline has begun: whether it has made a pass.
    batch: Option<bool>,
}

impl Clock {
    /// An optimizer stepped, or was skipped. A forward that raised before cannot be open any more.
    pub fn stepped(&mut self, optimizer: u32) {
        let last = self.last_pass();
        self.steps.optimizer_stepped(optimizer, last);
        self.models.values_mut().for_each(Passes::none_open);
    }

    /// A backward pass ended.
    pub fn backward_ended(&mut self) {
        let last = self.last_pass();
        self.steps.backward_ended(last);
    }

    /// The last step of inference of any model that trains, or of any at all.
    fn last_pass(&self) -> u64 {
        let trained = self.models.values().filter(|passes| passes.has_trained).map(|passes| passes.step).max();
        trained.unwrap_or_else(|| self.models.values().map(|passes| passes.step).max().unwrap_or_default())
    }

    /// The number of the next step to begin, by the rule in force: see [`Steps::next`].
    pub fn next(&self) -> u64 {
        self.steps.next(self.models.values().any(Passes::is_within_batch))
    }

    /// Whether some model was called.
    pub fn has_begun(&self) -> bool {
        self.models.values().any(|passes| passes.number > 0)
    }

    /// Whether one forward is under way, and that is not inside of another.
    pub fn is_outermost(&self) -> bool {
        self.models.values().map(Passes::forwards).sum::<usize>() == 1
    }

    /// No forward of a model is under way: it was destroyed.
    pub fn none_open(&mut self, model: u64) {
        if let Some(passes) = self.models.get_mut(&model) {
            passes.none_open();
            passes.microbatches = 0;
        }
    }

    /// Whether a call goes on with a pass that has begun, or is in none: by a part of a model or a tap in it, or by a module that
    /// is neither. Where steps are counted all that comes after one is in the next.
    pub fn goes_on(&self, model: Option<u64>, callers: &[Option<Caller>]) -> bool {
        self.steps.rule() == Rule::Inference
            && model.is_none_or(|model| self.models.get(&model).is_some_and(|passes| passes.goes_on(callers)))
    }

    /// Whatever is called next begins a pass.
    pub fn end_passes(&mut self) {
        self.models.values_mut().for_each(|passes| passes.is_over = true);
    }

    /// Whether no forward is under way, as far as is known, and no batch of which several make one.
    pub fn is_between(&self) -> bool {
        let is_within = || self.batch.unwrap_or_else(|| self.models.values().any(Passes::is_within_batch));
        let is_idle = self.models.values().all(|passes| passes.forwards() == 0);
        is_idle && (self.steps.rule() == Rule::Optimizer || !is_within())
    }

    /// Whether steps are counted, or will be since a pass trains, which ranks take together; or the last pass of every model was
    /// one of several ranks.
    pub fn is_together(&self) -> bool {
        let trains = || self.models.values().any(|passes| passes.has_trained);
        // One that some rank calls alone is counted there alone.
        let together = || !self.models.is_empty() && self.models.values().all(|passes| passes.together.was_together());
        self.steps.rule() != Rule::Inference || trains() || together()
    }

    /// By what rule the step under way will end.
    pub fn rule(&self) -> Rule {
        self.steps.rule()
    }

    /// The steps of the job.
    pub fn steps(&mut self) -> &mut Steps {
        &mut self.steps
    }

    /// The step that a model is in, as a call of no pass, which trains if the job does; `optimizers` hold the parameters
    /// that it is about.
    pub fn now(&self, model: u64, optimizers: &[u32]) -> Call {
        let train = self.steps.rule() != Rule::Inference;
        let (step, turn) = if train {
            (self.steps.now(), self.steps.turn(optimizers))
        } else {
            let step = self.models.get(&model).map_or(0, |passes| passes.step);
            (step, step)
        };
        Call { step, turn, train, ..Call::default() }
    }

    /// The last pass of a model that a backward pass can have gone through: its number and microbatch, and whether it trains.
    pub fn went_backward(&self, model: u64) -> (u64, u32, bool) {
        self.models.get(&model).and_then(|passes| passes.differentiable).unwrap_or((0, 0, true))
    }

    /// Whether the parameters of a step are those of the pass under way.
    pub fn has_parameters(&self, model: u64) -> bool {
        self.models.get(&model).is_some_and(|passes| passes.train || !passes.has_trained)
    }

    /// The last step that any model is in.
    pub fn last_step(&self) -> u64 {
        self.last_pass().max(self.steps.now())
    }

    /// The forward of a model or of a part of it begins; whether a pass does. `position` must come from one place in the code.
    pub fn enter(&mut self, model: u64, caller: Caller, position: StackPosition, trigger: &Trigger) -> bool {
        let passes = self.models.entry(model).or_default();
        if passes.microbatches > 0 {
            self.batch = self.batch.map(|_| true);
        }
        let before = passes.number;
        passes.enter(&mut self.steps, caller, position, trigger);
        passes.number > before
    }

    /// It ends, and with it whatever began inside of it.
    pub fn exit(&mut self, model: u64, caller: Caller, position: StackPosition, trigger: &Trigger) {
        if let Some(passes) = self.models.get_mut(&model) {
            passes.exit(caller, position, trigger);
        }
    }

    /// The pass of a model that is under way.
    pub fn under_way(&self, model: u64) -> Option<Made> {
        self.models.get(&model)?.together.open()
    }

    /// Other ranks have to know of it.
    pub fn keep(&mut self, model: u64) {
        if let Some(passes) = self.models.get_mut(&model) {
            passes.together.keep();
        }
    }

    /// Passes that have ended and of which other ranks have to know, by model.
    pub fn ended(&mut self) -> Vec<(u64, Ended)> {
        let of =
            |(&model, passes): (&u64, &mut Passes)| passes.together.take().into_iter().map(move |pass| (model, pass));
        self.models.iter_mut().flat_map(of).collect()
    }

    /// Nothing is under way any more.
    pub fn finish(&mut self) {
        self.models.values_mut().for_each(Passes::none_open);
    }

    /// A pipeline cuts a batch of the model into as many passes. `of_all`: all ranks have stages of it.
    pub fn microbatches(&mut self, model: u64, of_all: bool, count: u32) {
        let passes = self.models.entry(model).or_default();
        (passes.microbatches, passes.of_all) = (count, of_all);
    }

    /// A pipeline begins a batch, whatever became of the one before.
    pub fn batch(&mut self) {
        self.batch = Some(false);
        self.models.values_mut().filter(|passes| passes.microbatches > 0).for_each(|passes| passes.batch_over = true);
    }

    /// The first part of a model that the job called by itself: with it passes of parts begin.
    pub fn first_part(&mut self, model: u64, part: u64) {
        self.models.entry(model).or_default().first = Some(Caller::Part(part));
    }

    /// A tap of a model is triggered: its place in the pass, or `None` for a replay whose identity is not needed or not known.
    pub fn place(&mut self, model: u64, calls: &mut Calls, triggered: Triggered<'_>) -> Option<Call> {
        calls.place(self.models.entry(model).or_default(), &mut self.steps, triggered)
    }

    /// What a pass of a model was called with.
    pub fn input(&self, model: u64, pass: u64) -> Input {
        self.models.get(&model).map_or(Input::default(), |passes| passes.input(pass))
    }

    /// Nothing of a model is counted any more.
    pub fn forget(&mut self, model: u64) {
        self.models.remove(&model);
    }
}
