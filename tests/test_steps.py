"""Step, microbatch, call, train and eval, under accumulation, evaluation, checkpointing and uneven batches."""

import checkpointing
import pytest
import stepping
import tiny
import uneven

import captures
import harness
import reference_runs

KINDS = "forward,forward_pre,backward,backward_pre"


def test_microbatches_and_evaluations_are_counted_apart(run_once):
    expected, losses = reference_runs.accumulated(tiny.build(), {"layers.0.mlp", "lm_head"}.__contains__)
    outcome = run_once(harness.on_ranks("accumulate.py"), f"layers.0.mlp:{KINDS};lm_head:{KINDS}").expect(0)
    assert outcome.losses == losses
    captures.expect_sound(outcome.run)
    captures.expect_equal(captures.read(outcome.run), expected)


def test_uneven_batches_are_put_together_in_rank_order(run_once):
    wanted = {"layers.1.attn", "layers.1.mlp.up"}
    expected, losses = reference_runs.data_parallel(tiny.build(), wanted.__contains__, steps=2, sizes=uneven.SIZES)
    outcome = run_once(harness.on_ranks("uneven.py"), ";".join(f"{name}:{KINDS}" for name in wanted)).expect(0)
    assert outcome.losses == losses
    captures.expect_sound(outcome.run)
    captures.expect_equal(captures.read(outcome.run), expected)


MODES = ["reentrant", "plain"]


@pytest.mark.parametrize("number", range(len(MODES)), ids=MODES)
def test_a_checkpoint_replay_is_no_second_record(number, run_once, monkeypatch):
    wanted = {"layers.0.mlp", "layers.1.attn.proj", "twice", "lm_head"}
    # The reference computes the same without checkpointing.
    monkeypatch.setattr(checkpointing, "checkpoint", lambda function, *args, use_reentrant: function(*args))
    model, steps = checkpointing.build(MODES[number] == "reentrant"), checkpointing.STEPS
    expected, losses = reference_runs.data_parallel(model, wanted.__contains__, steps=steps)
    assert {key.call for key in expected if key.module == "twice"} == {0, 1}

    hooks = ";".join(f"{name}:{KINDS}" for name in sorted(wanted))
    outcome = run_once(harness.on_ranks("checkpointing.py", *MODES), hooks).expect(0)
    assert outcome.losses[number * steps :][:steps] == losses
    captures.expect_sound(outcome.run)
    found = captures.read(outcome.run, number)
    captures.expect_equal({k._replace(step=k.step - number * steps): v for k, v in found.items()}, expected)


def test_every_and_steps_choose_steps(run_once):
    hooks = "lm_head@every=3;layers.0.mlp:forward,backward@steps=2..4"
    outcome = run_once(harness.python("plain.py", "7"), hooks).expect(0)
    found = captures.read(outcome.run)
    assert {key.step for key in found if key.module == "lm_head"} == {0, 3, 6}
    for kind in ("forward", "backward"):
        assert {key.step for key in found if key.module == "layers.0.mlp" and key.kind == kind} == {2, 3, 4}


@pytest.fixture(scope="module")
def trained(run_once, untapped_once):
    argv = harness.python("stepping.py", "trained")
    hooks = ";".join(f"{name}:forward,param,grad,grad_unclipped" for name in ("scaled", "fused", "stored", "inside"))
    hooks += ";maker@every=2;judge@every=2;phased@every=2;scaled_end@mode=train;act@mode=eval,micro=1..2"
    outcome = run_once(argv, hooks).expect(0)
    assert outcome.losses == untapped_once(argv).losses
    return captures.expect_sound(outcome.run)


def passes(run, module):
    """(step, micro, trains) of a module's outputs, in their order; steps from the first on."""
    records = sorted((r for r in run[module] if r.kind == "forward"), key=lambda record: record.time_ns)
    return [(r.step, r.micro, r.train) for r in records]


def from_first(found):
    first = min(step for step, *_ in found)
    return [(step - first, *rest) for step, *rest in found]


def test_what_an_optimizer_skipped_is_a_step_too(trained):
    found = passes(trained, "scaled")
    # Steps of inference, with numbers of their own, and then those that the optimizer ends.
    assert found[:2] == [(0, 0, False), (1, 0, False)]
    evaluated, train = [found[2 + n :: 2] for n in range(2)]
    assert train == [(step, 0, True) for step in range(stepping.ITERATIONS)]
    assert [(step, train) for step, _, train in evaluated] == [(step, False) for step in range(stepping.ITERATIONS)]
    assert len(set(found)) == len(found)
    assert from_first(passes(trained, "fused")) == [(step, 0, True) for step in range(stepping.ITERATIONS)]


@pytest.mark.parametrize("name", ["scaled", "fused"])
def test_the_gradient_of_a_skipped_step_is_there_and_says_so(trained, name):
    grads = [r for r in trained[f"{name}.weight"] if r.kind == "grad"]
    grads.sort(key=lambda record: record.step)
    assert [r.skipped for r in grads] == [step == stepping.BROKEN for step in range(stepping.ITERATIONS)]
    assert [bool(r.stats.nan + r.stats.inf) for r in grads] == [r.skipped for r in grads]
    params = [r for r in trained[f"{name}.weight"] if r.kind == "param" and r.train]
    assert len(params) == stepping.ITERATIONS
    assert not any(r.skipped for r in params)


def test_every_counts_the_steps_of_the_optimizer_that_holds_a_module(trained):
    first = min(step for step, *_ in passes(trained, "judge"))
    # The judge's optimizer steps in even steps of the two, and the maker's in odd ones.
    assert sorted({step - first for step, *_ in passes(trained, "judge")}) == [0, 3, 4, 7]
    assert sorted({step - first for step, *_ in passes(trained, "maker")}) == [0, 1, 4, 5]


def test_every_counts_on_where_an_optimizer_takes_the_place_of_others(trained):
    last = max(step for step, *_ in passes(trained, "scaled_end") + passes(trained, "phased"))
    found = [step for step, *_ in passes(trained, "phased")]
    assert found[-2:] in ([last - 2, last], [last - 3, last - 1])
    assert len(found) == (2 + stepping.ITERATIONS) // 2


def test_the_step_that_makes_a_checkpoint_is_none(trained):
    assert from_first(passes(trained, "stored")) == [(s, 0, train) for s in range(2) for train in (False, True)]


def test_optimizers_in_the_backward_pass_end_one_step(trained):
    assert from_first(passes(trained, "inside")) == [(0, 0, True), (1, 0, True)]
    for name in ("weight", "bias"):
        assert len([r for r in trained[f"inside.{name}"] if r.kind == "grad"]) == 2


@pytest.mark.parametrize("name", ["scaled", "fused", "inside"])
def test_what_backward_passes_leave_is_what_the_optimizer_uses_where_nothing_clips_it(trained, name):
    """Unscaled, and taken in time where the optimizer steps in the backward pass."""
    of = trained[f"{name}.weight"]
    unclipped, used = ({r.step: r for r in of if r.kind == kind} for kind in ("grad_unclipped", "grad"))
    assert unclipped.keys() == used.keys() and used
    for step, record in used.items():
        if not record.skipped:
            assert captures.same_bytes(unclipped[step].tensor(), record.tensor())


def test_a_clause_may_mean_passes_of_one_kind(trained):
    assert all(train for _, _, train in passes(trained, "scaled_end"))
    assert len(passes(trained, "scaled_end")) == stepping.ITERATIONS
    assert all(not train and micro for _, micro, train in passes(trained, "act"))
    assert passes(trained, "act")


def test_updates_by_hand_end_steps(run_once, untapped_once):
    argv = harness.python("stepping.py", "by_hand")
    outcome = run_once(argv, "by_hand").expect(0)
    assert outcome.losses == untapped_once(argv).losses
    expected = [(0, 0, False)]
    for step in range(1, 1 + stepping.ITERATIONS):
        expected += [(step, 0, True), (step + 1, 0, False)]
    assert passes(captures.expect_sound(outcome.run), "by_hand") == expected


def test_each_pass_is_a_step_of_inference(run_once, untapped_once):
    argv = harness.python("stepping.py", "inference")
    outcome = run_once(argv, "inference@every=5;inference_end@steps=3..4;compiled").expect(0)
    assert outcome.losses == untapped_once(argv).losses
    run = captures.expect_sound(outcome.run)
    assert passes(run, "inference") == [(step, 0, False) for step in (0, 5, 10)]
    assert passes(run, "inference_end") == [(step, 0, False) for step in (3, 4)]
    assert passes(run, "compiled") == [(step, 0, True) for step in range(4)]
    assert run.info.steps == ("inference",)
