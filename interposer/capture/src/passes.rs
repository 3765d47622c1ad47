//! Steps, microbatches, calls and replays: which forward pass a tap fires in.
//!
//! - A *step* begins with the first forward pass after an optimizer stepped, however many optimizers did in between.
//! - A *microbatch* is an outermost forward pass of the model within the step, counted apart for training and
//!   evaluation. Where a script calls submodules directly, a pass ends when one of them is called again.
//! - *Outermost* is told by scopes: the model says when its forward begins and ends; where its parts are called
//!   directly, so does every module that holds a tapped one. An end may be missing (the forward raised). A call that is under way stands further up its thread's stack
//!   than one that begins inside of it, so what does not is over.
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
/// Most scopes under way: more than Python lets modules nest.
const MAX_SCOPES: usize = 1024;

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
    thread: usize,
    /// Smaller inside of calls: stacks grow downwards.
    address: usize,
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
struct Scope {
    caller: Caller,
    position: StackPosition,
}

/// The passes of one model.
#[derive(Debug, Default)]
pub struct Passes {
    step: u64,
    counted: [u32; 2],
    micro: u32,
    train: bool,
    number: u64,
    /// Forwards under way, as far as is known.
    scopes: Vec<Scope>,
    grad_enabled: bool,
    called: HashSet<Caller>,
    /// First sizes and digest of what the last passes were given.
    batches: VecDeque<(u64, [i64; 3], u32)>,
}

impl Passes {
    /// The forward of the model or of a part begins. `position` must come from one place in the code.
    pub fn enter(&mut self, clock: &mut Clock, caller: Caller, position: StackPosition, firing: &Firing) {
        if firing.replay {
            return;
        }
        self.scopes.retain(|s| s.position.thread != position.thread || s.position.address > position.address);
        if self.scopes.is_empty() {
            self.begin(clock, caller, firing);
        }
        if self.scopes.len() >= MAX_SCOPES {
            self.scopes.remove(0);
        }
        self.scopes.push(Scope { caller, position });
    }

    /// It ends, and with it whatever began inside of it.
    pub fn exit(&mut self, caller: Caller, position: StackPosition, firing: &Firing) {
        if firing.replay {
            return;
        }
        let here = |s: &Scope| s.position.thread == position.thread;
        if let Some(at) = self.scopes.iter().rposition(|s| here(s) && s.caller == caller) {
            let mut index = 0;
            self.scopes.retain(|s| {
                index += 1;
                index <= at || !here(s)
            });
        }
    }

    /// No forward is under way.
    pub fn none_open(&mut self) {
        self.scopes.clear();
    }

    fn begin(&mut self, clock: &mut Clock, caller: Caller, firing: &Firing) {
        let step = clock.begin_pass();
        let new_step = self.number == 0 || step != self.step;
        if new_step {
            self.step = step;
            self.counted = [0, 0];
        }
        // The model's own forward is a pass, whatever parts of it did before.
        if new_step || caller == Caller::Model || self.called.contains(&caller) {
            self.called.clear();
            self.train = firing.train;
            let [eval, train] = &mut self.counted;
            let counter = if firing.train { train } else { eval };
            self.micro = *counter;
            *counter += 1;
            self.number += 1;
            self.grad_enabled = firing.grad_enabled;
            self.batches.push_back((self.number, firing.first, firing.given));
            if self.batches.len() > REMEMBERED {
                self.batches.pop_front();
            }
        }
        self.called.insert(caller);
        self.grad_enabled |= firing.grad_enabled;
    }

    /// The first sizes of the pass's first input, as in [`Firing::first`].
    pub fn batch(&self, pass: u64) -> [i64; 3] {
        self.batches.iter().find(|(n, ..)| *n == pass).map_or([-1; 3], |(_, batch, _)| *batch)
    }

    /// The digest of that input, as in [`Firing::given`].
    pub fn input_digest(&self, pass: u64) -> u32 {
        self.batches.iter().find(|(n, ..)| *n == pass).map_or(0, |(.., given)| *given)
    }
}

/// What one tap remembers of its calls.
#[derive(Debug, Default)]
pub struct Calls {
    pass: u64,
    next: u32,
    /// Calls under way, and the threads that they are on.
    open: Vec<(usize, Option<Call>)>,
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
        let thread = StackPosition::here(&paired).thread;
        if paired
            && !firing.pre
            && let Some(last) = self.open.iter().rposition(|(t, _)| *t == thread)
        {
            let (_, call) = self.open.remove(last);
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
            self.open.push((thread, call));
        } else if let Some(call) = call {
            self.await_replay(passes, wants_gradients, firing, call);
        }
        call
    }

    fn fresh(&mut self, passes: &mut Passes, clock: &mut Clock, tap: u32, firing: &Firing) -> Call {
        if passes.scopes.is_empty() {
            // Called from outside: what is open is left of a forward that raised.
            self.open.clear();
            passes.begin(clock, Caller::Tap(tap), firing);
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
            ask: false,
        }
    }

    /// Reentrant checkpointing: without gradients now, though the model's forward has them.
    fn await_replay(&mut self, passes: &Passes, wants_gradients: bool, firing: &Firing, call: Call) {
        let replays = firing.recomputes || !firing.grad_enabled;
        if wants_gradients && !firing.replay && replays && passes.grad_enabled {
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

    fn at(depth: usize) -> StackPosition {
        StackPosition { thread: 0, address: 1000 - depth }
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

        /// A scope begins `depth` calls deep.
        fn enter(&mut self, caller: Caller, depth: usize) {
            self.passes.enter(&mut self.clock, caller, at(depth), &train());
        }

        fn exit(&mut self, caller: Caller, depth: usize) {
            self.passes.exit(caller, at(depth), &train());
        }

        fn pass(&mut self, firing: Firing) -> Vec<(u64, u32, u32)> {
            self.passes.enter(&mut self.clock, Caller::Model, at(0), &firing);
            let seen = vec![self.fire(0, firing).unwrap(), self.fire(1, firing).unwrap()];
            self.passes.exit(Caller::Model, at(0), &firing);
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
        w.enter(Caller::Model, 0);
        assert_eq!(w.fire(0, train()), Some((0, 0, 0)));
        assert_eq!(w.fire(0, train()), Some((0, 0, 1)));
    }

    #[test]
    fn what_runs_inside_a_part_called_directly_is_no_call_from_outside() {
        let mut w = World::new();
        for micro in 0..2 {
            w.enter(Caller::Part(0), 0);
            assert_eq!(w.fire(0, train()), Some((0, micro, 0)));
            w.enter(Caller::Part(1), 1);
            assert_eq!(w.fire(0, train()), Some((0, micro, 1)));
            w.exit(Caller::Part(1), 1);
            w.enter(Caller::Part(1), 1);
            assert_eq!(w.fire(0, train()), Some((0, micro, 2)));
            w.exit(Caller::Part(1), 1);
            w.exit(Caller::Part(0), 0);
            // Another part is of the same pass.
            w.enter(Caller::Part(2), 0);
            assert_eq!(w.fire(1, train()), Some((0, micro, 0)));
            w.exit(Caller::Part(2), 0);
        }
    }

    #[test]
    fn a_forward_that_raised_holds_no_other_inside_of_it() {
        let mut w = World::new();
        for micro in 0..3 {
            w.enter(Caller::Model, 3);
            w.enter(Caller::Part(0), 4);
            assert_eq!(w.fire(0, train()), Some((0, micro, 0)));
            // No exit. The next call comes from the same place.
        }
        w.enter(Caller::Part(0), 1);
        assert_eq!(w.fire(0, train()), Some((0, 2, 1)));
        w.exit(Caller::Part(0), 1);
        assert!(w.passes.scopes.is_empty());
    }

    #[test]
    fn the_model_begins_a_pass_and_a_part_called_after_it_is_in_that() {
        let mut w = World::new();
        let no_grad = Firing { grad_enabled: false, ..train() };
        w.passes.enter(&mut w.clock, Caller::Part(0), at(0), &no_grad);
        assert_eq!(w.fire(0, no_grad), Some((0, 0, 0)));
        w.exit(Caller::Part(0), 0);
        assert_eq!(w.pass(train()), [(0, 1, 0), (0, 1, 0)]);
        assert!(w.passes.grad_enabled);
        w.enter(Caller::Part(0), 0);
        assert_eq!(w.fire(0, train()), Some((0, 1, 1)));
        w.exit(Caller::Part(0), 0);
    }

    #[test]
    fn calls_on_several_threads_keep_their_own() {
        let mut w = World::new();
        w.enter(Caller::Model, 0);
        let World { clock, passes, taps: [tap, _] } = &mut w;
        let mut fire = |pre| tap.place(passes, clock, 0, true, false, &Firing { pre, ..train() }).unwrap().call;
        assert_eq!(fire(true), 0);
        std::thread::scope(|scope| {
            assert_eq!(scope.spawn(|| fire(true)).join().unwrap(), 1);
        });
        assert_eq!(fire(false), 0);
    }

    #[test]
    fn a_model_that_calls_itself_is_in_one_pass() {
        let mut w = World::new();
        w.enter(Caller::Model, 0);
        w.enter(Caller::Model, 1);
        assert_eq!(w.fire(0, train()), Some((0, 0, 0)));
        w.exit(Caller::Model, 1);
        assert_eq!(w.fire(0, train()), Some((0, 0, 1)));
        w.exit(Caller::Model, 0);
        assert!(w.passes.scopes.is_empty());
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
            w.enter(Caller::Model, 0);
            w.fire(0, inner);
            w.fire(0, inner);
            w.exit(Caller::Model, 0);
        }
        let replay = Firing { replay: true, ..train() };
        let order: Vec<_> = (0..5).map(|_| w.fire(0, replay)).collect();
        assert_eq!(order, [Some((0, 0, 1)), Some((0, 0, 0)), Some((0, 1, 1)), Some((0, 1, 0)), None]);
    }
}
