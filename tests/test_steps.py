"""Step, microbatch, call, train and eval, under accumulation, evaluation, checkpointing and uneven batches."""

import checkpointing
import pytest
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
