//! Steps, microbatches, calls and replays: which forward pass a tap fires in.
//!
//! - A *step* begins with the first forward pass after an optimizer stepped, however many optimizers did in between.
//! - A *microbatch* is an outermost forward pass of the model within the step, counted apart for training and
//!   evaluation. Where a script calls submodules directly, a pass ends when one of them is called again.
//! - A *call* counts a module's calls within a microbatch.
//! - A *replay* is a forward inside a backward pass: activation checkpointing. It is no pass of its own. Where the
//!   first forward ran without gradients (reentrant checkpointing), the replay carries the gradients, and takes the
//!   identity of the oldest pass that still waits for them, last call first.

use std::collections::{HashSet, VecDeque};

use wire::tap_abi::{Call, Firing};

/// Most calls of one tap that wait for a replay.
const MAX_AWAITING: usize = 1024;
/// Most calls of one tap under way: a module that calls itself, or forwards that raised.
const MAX_OPEN: usize = 64;
/// Passes whose batch sizes are remembered, for gradients that come late.
const REMEMBERED: usize = 64;

/// Optimizer steps.
#[derive(Debug, Default)]
pub struct Clock {
    step: u64,
    pending: bool,
}

impl Clock {
    /// An optimizer stepped.
    pub fn stepped(&mut self) {
        self.pending = true;
    }

    /// The step under way.
    pub fn now(&self) -> u64 {
        self.step
    }

    fn begin_pass(&mut self) -> u64 {
        if std::mem::take(&mut self.pending) {
            self.step += 1;
        }
        self.step
    }
}

/// The passes of one model.
#[derive(Debug, Default)]
pub struct Passes {
    step: u64,
    counted: [u32; 2],
    micro: u32,
    train: bool,
    number: u64,
    depth: u32,
    grad_enabled: bool,
    called: HashSet<u64>,
    batches: VecDeque<(u64, [i64; 3])>,
}

/// Key of the model itself among the modules called from outside.
const MODEL: u64 = u64::MAX;

impl Passes {
    /// The model's own forward begins.
    pub fn enter(&mut self, clock: &mut Clock, firing: &Firing) {
        if firing.replay {
            return;
        }
        if self.depth == 0 {
            self.begin(clock, MODEL, firing);
        }
        self.depth += 1;
    }

    /// The model's own forward ends.
    pub fn exit(&mut self, firing: &Firing) {
        if !firing.replay {
            self.depth = self.depth.saturating_sub(1);
        }
    }

    /// A forward that raised never reached its end: the next outermost one must not look nested.
    pub fn reset_depth(&mut self) {
        self.depth = 0;
    }

    fn begin(&mut self, clock: &mut Clock, caller: u64, firing: &Firing) {
        let step = clock.begin_pass();
        let new_step = self.number == 0 || step != self.step;
        if new_step {
            self.step = step;
            self.counted = [0, 0];
        }
        if new_step || firing.train != self.train && caller == MODEL || self.called.contains(&caller) {
            self.called.clear();
            self.train = firing.train;
            let [eval, train] = &mut self.counted;
            let counter = if firing.train { train } else { eval };
            self.micro = *counter;
            *counter += 1;
            self.number += 1;
            self.grad_enabled = firing.grad_enabled;
            self.batches.push_back((self.number, firing.first));
            if self.batches.len() > REMEMBERED {
                self.batches.pop_front();
            }
        }
        self.called.insert(caller);
    }

    /// The first sizes of the pass's first input, as in [`Firing::first`].
    pub fn batch(&self, pass: u64) -> [i64; 3] {
        self.batches.iter().find(|(n, _)| *n == pass).map_or([-1; 3], |(_, batch)| *batch)
    }
}

/// What one tap remembers of its calls.
#[derive(Debug, Default)]
pub struct Calls {
    pass: u64,
    next: u32,
    open: Vec<Option<Call>>,
    awaiting: VecDeque<Call>,
}

impl Calls {
    /// The tap fires: its place in the pass, or `None` for a replay whose identity is not needed or not known.
    /// `paired` says that the tap fires before *and* after the forward, so that both get the same answer.
    pub fn place(
        &mut self,
        passes: &mut Passes,
        clock: &mut Clock,
        tap: u32,
        paired: bool,
        wants_gradients: bool,
        firing: &Firing,
    ) -> Option<Call> {
        if paired
            && !firing.pre
            && let Some(call) = self.open.pop()
        {
            if let Some(call) = call {
                self.await_replay(passes, wants_gradients, firing, call);
            }
            return call;
        }
        let call = if firing.replay { self.replayed(firing) } else { Some(self.fresh(passes, clock, tap, firing)) };
        if paired && firing.pre {
            if self.open.len() >= MAX_OPEN {
                self.open.remove(0);
            }
            self.open.push(call);
        } else if let Some(call) = call {
            self.await_replay(passes, wants_gradients, firing, call);
        }
        call
    }

    fn fresh(&mut self, passes: &mut Passes, clock: &mut Clock, tap: u32, firing: &Firing) -> Call {
        if passes.depth == 0 {
            // Called from outside: what is open is left of a forward that raised.
            self.open.clear();
            passes.begin(clock, u64::from(tap), firing);
        }
        if self.pass != passes.number {
            self.pass = passes.number;
            self.next = 0;
            // What is left of a pass that raised.
            self.open.clear();
        }
        let call = self.next;
        self.next += 1;
        Call {
            tap,
            step: passes.step,
            micro: passes.micro,
            call,
            pass: passes.number,
            train: firing.train,
            recompute: false,
            capture: 0,
            edit: 0,
            first: firing.first,
        }
    }

    /// Reentrant checkpointing: without gradients now, though the model's forward has them.
    fn await_replay(&mut self, passes: &Passes, wants_gradients: bool, firing: &Firing, call: Call) {
        if wants_gradients && !firing.replay && !firing.grad_enabled && passes.grad_enabled {
            if self.awaiting.front().is_some_and(|c| c.step != call.step) || self.awaiting.len() >= MAX_AWAITING {
                self.awaiting.clear();
            }
            self.awaiting.push_back(call);
        }
    }

    fn replayed(&mut self, firing: &Firing) -> Option<Call> {
        if !firing.grad_enabled {
            return None;
        }
        let oldest = self.awaiting.front()?.pass;
        let last = self.awaiting.iter().rposition(|c| c.pass == oldest)?;
        self.awaiting.remove(last).map(|call| Call { recompute: true, ..call })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn train() -> Firing {
        Firing { grad_enabled: true, train: true, first: [4, 8, -1], ..Firing::default() }
    }

    struct World {
        clock: Clock,
        passes: Passes,
        taps: [Calls; 2],
    }

    impl World {
        fn new() -> Self {
            Self { clock: Clock::default(), passes: Passes::default(), taps: Default::default() }
        }

        fn fire(&mut self, tap: usize, firing: Firing) -> Option<(u64, u32, u32)> {
            let World { clock, passes, taps } = self;
            taps[tap].place(passes, clock, tap as u32, false, true, &firing).map(|c| (c.step, c.micro, c.call))
        }

        fn pass(&mut self, firing: Firing) -> Vec<(u64, u32, u32)> {
            self.passes.enter(&mut self.clock, &firing);
            let seen = vec![self.fire(0, firing).unwrap(), self.fire(1, firing).unwrap()];
            self.passes.exit(&firing);
            seen
        }
    }

    #[test]
    fn several_optimizers_before_a_forward_are_one_step() {
        let mut w = World::new();
        assert_eq!(w.pass(train()), [(0, 0, 0), (0, 0, 0)]);
        w.clock.stepped();
        w.clock.stepped();
        assert_eq!(w.pass(train()), [(1, 0, 0), (1, 0, 0)]);
    }

    #[test]
    fn accumulation_counts_microbatches_and_evaluation_counts_apart() {
        let mut w = World::new();
        w.pass(train());
        assert_eq!(w.pass(train())[0], (0, 1, 0));
        w.clock.stepped();
        let eval = Firing { train: false, grad_enabled: false, ..train() };
        assert_eq!(w.pass(eval)[0], (1, 0, 0));
        assert_eq!(w.pass(eval)[0], (1, 1, 0));
        assert_eq!(w.pass(train())[0], (1, 0, 0));
    }

    #[test]
    fn a_module_called_twice_in_a_pass_has_two_calls() {
        let mut w = World::new();
        w.passes.enter(&mut w.clock, &train());
        assert_eq!(w.fire(0, train()), Some((0, 0, 0)));
        assert_eq!(w.fire(0, train()), Some((0, 0, 1)));
    }

    #[test]
    fn submodules_called_directly_share_a_pass_until_one_repeats() {
        let mut w = World::new();
        assert_eq!(w.fire(0, train()), Some((0, 0, 0)));
        assert_eq!(w.fire(1, train()), Some((0, 0, 0)));
        assert_eq!(w.fire(0, train()), Some((0, 1, 0)));
        assert_eq!(w.fire(1, train()), Some((0, 1, 0)));
    }

    #[test]
    fn a_direct_call_after_one_that_raised_is_a_pass_of_its_own() {
        let (mut clock, mut passes, mut calls) = (Clock::default(), Passes::default(), Calls::default());
        let before = Firing { pre: true, ..train() };
        for micro in 0..3 {
            let call = calls.place(&mut passes, &mut clock, 0, true, true, &before).unwrap();
            assert_eq!((call.micro, call.call), (micro, 0));
        }
    }

    #[test]
    fn a_replay_without_need_has_no_identity_and_changes_nothing() {
        let mut w = World::new();
        w.pass(train());
        assert_eq!(w.fire(0, Firing { replay: true, ..train() }), None);
        assert_eq!(w.pass(train())[0], (0, 1, 0));
    }

    #[test]
    fn a_reentrant_replay_takes_the_identity_of_its_forward() {
        let mut w = World::new();
        let inner = Firing { grad_enabled: false, ..train() };
        for _ in 0..2 {
            w.passes.enter(&mut w.clock, &train());
            w.fire(0, inner);
            w.fire(0, inner);
            w.passes.exit(&train());
        }
        let replay = Firing { replay: true, ..train() };
        let order: Vec<_> = (0..5).map(|_| w.fire(0, replay)).collect();
        assert_eq!(order, [Some((0, 0, 1)), Some((0, 0, 0)), Some((0, 1, 1)), Some((0, 1, 0)), None]);
    }
}
