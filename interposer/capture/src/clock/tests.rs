//! What counts as a step, a microbatch, a pass and a call.

use super::*;

fn train() -> Firing {
    Firing { grad_enabled: true, train: true, first: [4, 8, -1], ..Firing::default() }
}

fn at(depth: usize) -> StackPosition {
    StackPosition { thread: 0, address: 1000 - depth }
}

const MODEL: u64 = 7;

/// A model with two taps.
#[derive(Default)]
struct World {
    clock: Clock,
    taps: [Calls; 2],
}

impl World {
    fn new() -> Self {
        Self::default()
    }

    fn passes(&self) -> &Passes {
        &self.clock.models[&MODEL]
    }

    fn fire(&mut self, tap: usize, firing: Firing) -> Option<(u64, u32, u32)> {
        let fired = Fired { tap: tap as u32, paired: false, wants_gradients: true, firing: &firing };
        self.clock.place(MODEL, &mut self.taps[tap], fired).map(|c| (c.step, c.micro, c.call))
    }

    /// A forward begins `depth` calls deep.
    fn enter(&mut self, caller: Caller, depth: usize) {
        self.clock.enter(MODEL, caller, at(depth), &train());
    }

    fn exit(&mut self, caller: Caller, depth: usize) {
        self.clock.exit(MODEL, caller, at(depth), &train());
    }

    fn pass(&mut self, firing: Firing) -> Vec<(u64, u32, u32)> {
        self.clock.enter(MODEL, Caller::Model, at(0), &firing);
        let seen = vec![self.fire(0, firing).unwrap(), self.fire(1, firing).unwrap()];
        self.clock.exit(MODEL, Caller::Model, at(0), &firing);
        seen
    }
}

fn evaluation() -> Firing {
    Firing { train: false, grad_enabled: false, ..train() }
}

#[test]
fn inference_counts_every_pass_in_one_step() {
    let mut w = World::new();
    for micro in 0..3 {
        assert_eq!(w.pass(evaluation()), [(0, micro, 0), (0, micro, 0)]);
    }
}

#[test]
fn training_counts_a_step_with_the_first_pass_after_an_optimizer_stepped() {
    let mut w = World::new();
    for step in 0..3 {
        assert_eq!(w.pass(train()), [(step, 0, 0), (step, 0, 0)]);
        assert_eq!(w.clock.step(), step);
        w.clock.stepped();
        assert_eq!(w.clock.step(), step, "it begins with the next pass");
    }
}

/// A scaler of losses leaves an optimizer's step out where gradients are not finite: nothing was stepped.
#[test]
fn a_skipped_step_is_none_and_the_next_pass_is_another_microbatch() {
    let mut w = World::new();
    w.pass(train());
    w.clock.stepped();
    assert_eq!(w.pass(train())[0], (1, 0, 0));
    assert_eq!(w.pass(train())[0], (1, 1, 0), "the step in between was skipped");
    w.clock.stepped();
    assert_eq!(w.pass(train())[0], (2, 0, 0));
}

#[test]
fn models_share_steps_and_count_their_own_microbatches() {
    let (mut w, mut teacher) = (World::new(), Calls::default());
    let mut teach = |w: &mut World| {
        let fired = Fired { tap: 9, paired: false, wants_gradients: false, firing: &evaluation() };
        w.clock.place(8, &mut teacher, fired).map(|c| (c.step, c.micro))
    };
    assert_eq!((teach(&mut w), w.pass(train())[0]), (Some((0, 0)), (0, 0, 0)));
    assert_eq!(teach(&mut w), Some((0, 1)));
    w.clock.stepped();
    assert_eq!((teach(&mut w), w.pass(train())[0]), (Some((1, 0)), (1, 0, 0)), "one step, not two");
}

#[test]
fn the_input_of_a_pass_is_known_for_gradients_that_come_late() {
    let mut w = World::new();
    w.pass(Firing { input_digest: 5, ..train() });
    w.pass(Firing { first: [2, -1, -1], ..train() });
    assert_eq!(w.clock.input(MODEL, 1), Input { sizes: [4, 8, -1], digest: 5 });
    assert_eq!(w.clock.input(MODEL, 2).sizes, [2, -1, -1]);
    assert_eq!(w.clock.input(MODEL, 3), Input::default());
    w.clock.forget(MODEL);
    assert_eq!(w.clock.input(MODEL, 1), Input::default());
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
    let eval = evaluation();
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
    assert!(w.passes().forwards.is_empty());
}

#[test]
fn the_model_begins_a_pass_and_a_part_called_after_it_is_in_that() {
    let mut w = World::new();
    let no_grad = Firing { grad_enabled: false, ..train() };
    w.clock.enter(MODEL, Caller::Part(0), at(0), &no_grad);
    assert_eq!(w.fire(0, no_grad), Some((0, 0, 0)));
    w.exit(Caller::Part(0), 0);
    assert_eq!(w.pass(train()), [(0, 1, 0), (0, 1, 0)]);
    assert!(w.passes().grad_enabled);
    w.enter(Caller::Part(0), 0);
    assert_eq!(w.fire(0, train()), Some((0, 1, 1)));
    w.exit(Caller::Part(0), 0);
}

#[test]
fn calls_on_several_threads_keep_their_own() {
    let mut w = World::new();
    w.enter(Caller::Model, 0);
    let World { clock, taps: [tap, _] } = &mut w;
    let mut fire = |pre| {
        let firing = Firing { pre, ..train() };
        let fired = Fired { tap: 0, paired: true, wants_gradients: false, firing: &firing };
        clock.place(MODEL, tap, fired).unwrap().call
    };
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
    assert!(w.passes().forwards.is_empty());
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
    let (mut clock, mut calls) = (Clock::default(), Calls::default());
    let before = Firing { pre: true, ..train() };
    let fired = Fired { tap: 0, paired: true, wants_gradients: true, firing: &before };
    for micro in 0..3 {
        let call = clock.place(MODEL, &mut calls, fired).unwrap();
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
