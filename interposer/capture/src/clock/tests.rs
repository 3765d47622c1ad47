//! What counts as a step, a microbatch, a pass and a call.

use super::*;

fn train() -> Trigger {
    Trigger { grad_enabled: true, train: true, first: [4, 8, -1], ..Trigger::default() }
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
    /// In a process that made an optimizer.
    fn new() -> Self {
        let mut w = Self::default();
        w.clock.steps().optimizer_made();
        w
    }

    fn passes(&self) -> &Passes {
        &self.clock.models[&MODEL]
    }

    fn call(&mut self, tap: usize, trigger: Trigger) -> Option<Call> {
        let triggered =
            Triggered { tap: tap as u32, paired: false, wants_gradients: true, optimizers: &[], trigger: &trigger };
        self.clock.place(MODEL, &mut self.taps[tap], triggered)
    }

    fn trigger(&mut self, tap: usize, trigger: Trigger) -> Option<(u64, u32, u32)> {
        self.call(tap, trigger).map(|c| (c.step, c.micro, c.call))
    }

    /// A forward begins `depth` calls deep.
    fn enter(&mut self, caller: Caller, depth: usize) {
        self.clock.enter(MODEL, caller, at(depth), &train());
    }

    fn exit(&mut self, caller: Caller, depth: usize) {
        self.clock.exit(MODEL, caller, at(depth), &train());
    }

    fn pass(&mut self, trigger: Trigger) -> Vec<(u64, u32, u32)> {
        self.clock.enter(MODEL, Caller::Model, at(0), &trigger);
        let seen = vec![self.trigger(0, trigger).unwrap(), self.trigger(1, trigger).unwrap()];
        self.clock.exit(MODEL, Caller::Model, at(0), &trigger);
        seen
    }
}

fn evaluation() -> Trigger {
    Trigger { train: false, grad_enabled: false, ..train() }
}

#[test]
fn in_inference_each_pass_is_a_step_and_training_has_numbers_of_its_own() {
    let mut w = World::default();
    for step in 0..3 {
        assert_eq!(w.pass(evaluation()), [(step, 0, 0), (step, 0, 0)]);
    }
    assert_eq!((w.clock.steps().rule(), w.clock.last_step()), (Rule::Inference, 2));
    w.clock.steps().optimizer_made();
    let call = |w: &mut World, trigger| {
        w.clock.enter(MODEL, Caller::Model, at(0), &trigger);
        w.call(0, trigger).map(|call| (call.step, call.micro, call.train)).unwrap()
    };
    assert_eq!(call(&mut w, evaluation()), (0, 1, false), "it is in the step that the job trains, and another one");
    assert_eq!(call(&mut w, train()), (0, 0, true));
    for step in 1..4 {
        w.clock.stepped(0);
        assert_eq!(call(&mut w, evaluation()), (step, u32::from(step < 3), false));
    }
}

#[test]
fn the_microbatches_of_a_pipeline_are_one_step_of_inference() {
    let mut w = World::default();
    w.clock.microbatches(MODEL, false, 2);
    let seen: Vec<_> = (0..4).map(|_| w.pass(evaluation())[0]).collect();
    assert_eq!(seen, [(0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 0)]);
}

#[test]
fn a_batch_of_a_pipeline_is_one_of_several_ranks() {
    let at = |collectives: i64| {
        let mut trigger = Trigger { collectives: [-1; 8], ..evaluation() };
        trigger.collectives[0] = collectives;
        trigger
    };
    let seen = |of_all: bool, collectives: &[i64]| -> Vec<bool> {
        let mut w = World::default();
        w.clock.microbatches(MODEL, of_all, 2);
        let passes = collectives.iter().map(|&each| {
            w.pass(at(each));
            w.clock.is_together()
        });
        passes.collect()
    };
    assert_eq!(seen(true, &[-1, -1, -1]), [true, true, true], "of its stages");
    assert_eq!(seen(false, &[3, 3, 4, 4, 4, 4]), [false, false, true, true, false, false], "and of others as they say");
    assert_eq!(seen(false, &[-1, -1]), [false, false], "another pipeline goes at its own pace");
}

#[test]
fn a_batch_that_has_begun_is_over_when_the_next_begins() {
    let mut w = World::default();
    w.clock.microbatches(MODEL, true, 3);
    let mut seen = Vec::new();
    // The second one raises.
    for passes in [3, 1, 3] {
        w.clock.batch();
        assert!(w.clock.is_between(), "nothing of it is made");
        for _ in 0..passes {
            seen.push(w.pass(evaluation())[0]);
            assert!(!w.clock.is_between());
        }
    }
    let steps = [(0, 0, 0), (0, 1, 0), (0, 2, 0), (1, 0, 0), (2, 0, 0), (2, 1, 0), (2, 2, 0)];
    assert_eq!(seen, steps);
    w.clock.batch();
    assert_eq!(w.clock.next(), 3);
}

#[test]
fn stages_of_one_rank_begin_a_batch_together() {
    let mut w = World::default();
    for model in [1, 2] {
        w.clock.microbatches(model, true, 1);
    }
    for _ in 0..2 {
        w.clock.batch();
        for model in [1, 2] {
            assert_eq!(w.clock.is_between(), model == 1);
            w.clock.enter(model, Caller::Model, at(0), &evaluation());
            w.clock.exit(model, Caller::Model, at(0), &evaluation());
        }
    }
}

#[test]
fn parts_that_are_called_one_after_the_other_are_one_step_of_inference() {
    let mut w = World::default();
    for step in 0..3 {
        for part in 0..2 {
            w.enter(Caller::Part(part), 0);
            assert_eq!(w.trigger(part as usize, evaluation()), Some((step, 0, 0)));
            w.exit(Caller::Part(part), 0);
        }
    }
}

#[test]
fn a_part_goes_on_with_a_pass_and_begins_one_where_it_was_called_before() {
    let mut w = World::default();
    let goes_on = |w: &World, part: u64| w.clock.goes_on(Some(MODEL), &[Some(Caller::Part(part)), None]);
    assert!(!goes_on(&w, 0) && w.clock.goes_on(None, &[]), "what is in no model begins nothing");
    for step in 0..3 {
        assert!(!goes_on(&w, 0), "step {step}");
        for part in 0..3 {
            w.enter(Caller::Part(part), 0);
            w.exit(Caller::Part(part), 0);
            assert_eq!((w.passes().step, goes_on(&w, part), goes_on(&w, part + 1)), (step, false, true));
        }
    }
    w.clock.end_passes();
    assert!(!goes_on(&w, 7));
    w.enter(Caller::Part(7), 0);
    w.exit(Caller::Part(7), 0);
    assert_eq!((w.passes().step, goes_on(&w, 0)), (3, true), "of other hooks, it begins a pass all the same");
    // One that is tapped from now on, and is called before those that were.
    w.clock.first_part(MODEL, 9);
    for step in 4..6 {
        assert!(!goes_on(&w, 9));
        for part in [9, 7] {
            w.enter(Caller::Part(part), 0);
            w.exit(Caller::Part(part), 0);
            assert_eq!(w.passes().step, step);
        }
    }
    w.clock.steps().optimizer_made();
    assert!(
        !goes_on(&w, 9) && !w.clock.goes_on(None, &[]),
        "where steps are counted, what comes after one is in the next"
    );
}

#[test]
fn updates_by_hand_end_a_step_with_the_pass_after_a_backward_pass() {
    let mut w = World::default();
    assert_eq!(w.pass(evaluation())[0], (0, 0, 0));
    for step in 1..4 {
        assert_eq!(w.pass(train())[0], (step, 0, 0));
        w.clock.backward_ended();
    }
    assert_eq!(w.pass(evaluation())[0], (4, 0, 0));
    assert_eq!(w.clock.steps().rule(), Rule::Backward);
    // With an optimizer, backward passes add up.
    w.clock.steps().optimizer_made();
    for micro in 0..2 {
        assert_eq!(w.pass(train())[0], (4, micro, 0));
        w.clock.backward_ended();
    }
}

#[test]
fn every_counts_the_steps_of_the_optimizers_that_hold_a_module() {
    let mut w = World::new();
    let sets: [&[u32]; 4] = [&[0], &[1], &[0, 1], &[]];
    assert!(!sets.iter().any(|set| w.clock.steps().count_turns(set)), "not many");
    let mut seen = Vec::new();
    for optimizer in [0, 1, 0, 1, 0] {
        w.pass(train());
        seen.push(sets.map(|set| w.clock.steps().turn(set)));
        w.clock.stepped(optimizer);
    }
    assert_eq!(seen, [[0, 0, 0, 0], [1, 0, 1, 1], [1, 1, 2, 2], [2, 1, 3, 3], [2, 2, 4, 4]]);
    // One that came later counts from the step that is next, and one that holds nothing any more is forgotten.
    w.clock.steps().count_turns(&[7]);
    w.pass(train());
    w.clock.steps().forget_turns(|optimizers| optimizers != [0]);
    assert_eq!([&[7], &[0]].map(|set| w.clock.steps().turn(set)), [5, 5]);
}

#[test]
fn backward_passes_within_a_batch_of_a_pipeline_end_no_step() {
    let mut w = World::default();
    w.clock.microbatches(MODEL, false, 2);
    let mut seen = Vec::new();
    for _ in 0..6 {
        seen.push(w.pass(train())[0]);
        w.clock.backward_ended();
    }
    assert_eq!(seen, [(0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 0), (2, 0, 0), (2, 1, 0)]);
}

#[test]
fn training_counts_a_step_with_the_first_pass_after_an_optimizer_stepped() {
    let mut w = World::new();
    for step in 0..3 {
        assert_eq!(w.pass(train()), [(step, 0, 0), (step, 0, 0)]);
        assert_eq!(w.clock.steps().now(), step);
        w.clock.stepped(0);
        assert_eq!(w.clock.steps().now(), step, "it begins with the next pass");
    }
}

/// A scaler of losses leaves an optimizer's step out where gradients are not finite: nothing was stepped.
#[test]
fn a_skipped_step_is_none_and_the_next_pass_is_another_microbatch() {
    let mut w = World::new();
    w.pass(train());
    w.clock.stepped(0);
    assert_eq!(w.pass(train())[0], (1, 0, 0));
    assert_eq!(w.pass(train())[0], (1, 1, 0), "the step in between was skipped");
    w.clock.stepped(0);
    assert_eq!(w.pass(train())[0], (2, 0, 0));
}

#[test]
fn models_share_steps_and_count_their_own_microbatches() {
    let (mut w, mut teacher) = (World::new(), Calls::default());
    let mut teach = |w: &mut World| {
        let triggered =
            Triggered { tap: 9, paired: false, wants_gradients: false, optimizers: &[], trigger: &evaluation() };
        w.clock.place(8, &mut teacher, triggered).map(|c| (c.step, c.micro))
    };
    assert_eq!((teach(&mut w), w.pass(train())[0]), (Some((0, 0)), (0, 0, 0)));
    assert_eq!(teach(&mut w), Some((0, 1)));
    w.clock.stepped(0);
    assert_eq!((teach(&mut w), w.pass(train())[0]), (Some((1, 0)), (1, 0, 0)), "one step, not two");
}

#[test]
fn the_input_of_a_pass_is_known_for_gradients_that_come_late() {
    let mut w = World::new();
    w.pass(Trigger { input_digest: 5, ..train() });
    w.pass(Trigger { first: [2, -1, -1], ..train() });
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
    w.clock.stepped(0);
    w.clock.stepped(0);
    assert_eq!(w.pass(train()), [(1, 0, 0), (1, 0, 0)]);
}

#[test]
fn accumulation_counts_microbatches_and_evaluation_counts_apart() {
    let mut w = World::new();
    w.pass(train());
    assert_eq!(w.pass(train())[0], (0, 1, 0));
    w.clock.stepped(0);
    let eval = evaluation();
    assert_eq!(w.pass(eval)[0], (1, 0, 0));
    assert_eq!(w.pass(eval)[0], (1, 1, 0));
    assert_eq!(w.pass(train())[0], (1, 0, 0));
}

#[test]
fn a_module_called_twice_in_a_pass_has_two_calls() {
    let mut w = World::new();
    w.enter(Caller::Model, 0);
    assert_eq!(w.trigger(0, train()), Some((0, 0, 0)));
    assert_eq!(w.trigger(0, train()), Some((0, 0, 1)));
}

#[test]
fn what_runs_inside_a_part_called_directly_is_no_call_from_outside() {
    let mut w = World::new();
    for micro in 0..2 {
        w.enter(Caller::Part(0), 0);
        assert_eq!(w.trigger(0, train()), Some((0, micro, 0)));
        w.enter(Caller::Part(1), 1);
        assert_eq!(w.trigger(0, train()), Some((0, micro, 1)));
        w.exit(Caller::Part(1), 1);
        w.enter(Caller::Part(1), 1);
        assert_eq!(w.trigger(0, train()), Some((0, micro, 2)));
        w.exit(Caller::Part(1), 1);
        w.exit(Caller::Part(0), 0);
        // Another part is of the same pass.
        w.enter(Caller::Part(2), 0);
        assert_eq!(w.trigger(1, train()), Some((0, micro, 0)));
        w.exit(Caller::Part(2), 0);
    }
}

#[test]
fn a_forward_that_raised_holds_no_other_inside_of_it() {
    let mut w = World::new();
    for micro in 0..3 {
        w.enter(Caller::Model, 3);
        w.enter(Caller::Part(0), 4);
        assert_eq!(w.trigger(0, train()), Some((0, micro, 0)));
        // No exit. The next call comes from the same place.
    }
    w.enter(Caller::Part(0), 1);
    assert_eq!(w.trigger(0, train()), Some((0, 2, 1)));
    w.exit(Caller::Part(0), 1);
    assert!(w.passes().forwards.is_empty());
}

#[test]
fn the_model_begins_a_pass_and_a_part_called_after_it_is_in_that() {
    let mut w = World::new();
    let no_grad = Trigger { grad_enabled: false, ..train() };
    w.clock.enter(MODEL, Caller::Part(0), at(0), &no_grad);
    assert_eq!(w.trigger(0, no_grad), Some((0, 0, 0)));
    w.exit(Caller::Part(0), 0);
    assert_eq!(w.pass(train()), [(0, 0, 0), (0, 0, 0)], "the first that trains");
    assert!(w.passes().grad_enabled);
    w.enter(Caller::Part(0), 0);
    assert_eq!(w.trigger(0, train()), Some((0, 0, 1)));
    w.exit(Caller::Part(0), 0);
}

#[test]
fn a_pass_trains_or_not_as_a_whole() {
    let of = |mode: bool, grad: bool| Trigger { train: mode, grad_enabled: grad, ..train() };
    for (mode, grad) in [(true, true), (true, false), (false, true), (false, false)] {
        let mut w = World::new();
        w.clock.enter(MODEL, Caller::Model, at(0), &of(mode, grad));
        // Frozen batch norm, a part under checkpointing, and dropout that samples.
        let inside =
            [of(false, true), of(true, false), of(true, true)].map(|trigger| w.call(0, trigger).unwrap().train);
        assert_eq!(inside, [mode && grad; 3]);
    }
}

#[test]
fn a_sampler_in_training_mode_shifts_no_training_pass() {
    let mut w = World::new();
    for step in 0..2 {
        for micro in 0..step {
            assert_eq!(w.pass(Trigger { grad_enabled: false, ..train() })[0], (step, micro as u32, 0));
        }
        assert_eq!(w.pass(train())[0], (step, 0, 0));
        w.clock.stepped(0);
    }
}

#[test]
fn calls_on_several_threads_keep_their_own() {
    let mut w = World::new();
    w.enter(Caller::Model, 0);
    let World { clock, taps: [tap, _] } = &mut w;
    let mut trigger = |pre| {
        let trigger = Trigger { pre, ..train() };
        let triggered = Triggered { tap: 0, paired: true, wants_gradients: false, optimizers: &[], trigger: &trigger };
        clock.place(MODEL, tap, triggered).unwrap().call
    };
    assert_eq!(trigger(true), 0);
    std::thread::scope(|scope| {
        assert_eq!(scope.spawn(|| trigger(true)).join().unwrap(), 1);
    });
    assert_eq!(trigger(false), 0);
}

#[test]
fn a_model_that_calls_itself_is_in_one_pass() {
    let mut w = World::new();
    w.enter(Caller::Model, 0);
    w.enter(Caller::Model, 1);
    assert_eq!(w.trigger(0, train()), Some((0, 0, 0)));
    w.exit(Caller::Model, 1);
    assert_eq!(w.trigger(0, train()), Some((0, 0, 1)));
    w.exit(Caller::Model, 0);
    assert!(w.passes().forwards.is_empty());
}

#[test]
fn submodules_called_directly_share_a_pass_until_one_repeats() {
    let mut w = World::new();
    assert_eq!(w.trigger(0, train()), Some((0, 0, 0)));
    assert_eq!(w.trigger(1, train()), Some((0, 0, 0)));
    assert_eq!(w.trigger(0, train()), Some((0, 1, 0)));
    assert_eq!(w.trigger(1, train()), Some((0, 1, 0)));
}

#[test]
fn a_direct_call_after_one_that_raised_is_a_pass_of_its_own() {
    let (mut clock, mut calls) = (Clock::default(), Calls::default());
    clock.steps().optimizer_made();
    let before = Trigger { pre: true, ..train() };
    let triggered = Triggered { tap: 0, paired: true, wants_gradients: true, optimizers: &[], trigger: &before };
    for micro in 0..3 {
        let call = clock.place(MODEL, &mut calls, triggered).unwrap();
        assert_eq!((call.micro, call.call), (micro, 0));
    }
}

#[test]
fn a_replay_without_need_has_no_identity_and_changes_nothing() {
    let mut w = World::new();
    w.pass(train());
    assert_eq!(w.trigger(0, Trigger { replay: true, ..train() }), None);
    assert_eq!(w.pass(train())[0], (0, 1, 0));
}

#[test]
fn a_reentrant_replay_takes_the_identity_of_its_forward() {
    let mut w = World::new();
    let inner = Trigger { grad_enabled: false, ..train() };
    for _ in 0..2 {
        w.enter(Caller::Model, 0);
        w.trigger(0, inner);
        w.trigger(0, inner);
        w.exit(Caller::Model, 0);
    }
    let replay = Trigger { replay: true, ..train() };
    let order: Vec<_> = (0..5).map(|_| w.trigger(0, replay)).collect();
    assert_eq!(order, [Some((0, 0, 1)), Some((0, 0, 0)), Some((0, 1, 1)), Some((0, 1, 0)), None]);
}
