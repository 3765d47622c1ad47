"""Models are found however they were put together, and what cannot be tapped is named."""

import pytest

import captures
import harness

BLOCKS = {name for i in range(3) for name in (f"layers.{i}", f"layers.{i}.linear")}


# What was called before a tool has a part in every call is nothing: this one comes first.
WAYS = {
    "profiled": [{"linear", ""}, {"linear", ""}],
    "lone": [{"0", "1", ""}, {""}, {""}],
    "grown": [{*BLOCKS, "layers.3", "layers.3.linear", "head", ""}],
    "inserted": [{*BLOCKS, "head", ""}],
    "overriding": [{"linear", ""}, {"0", ""}],
}
PART = "1 is compiled by torch.jit, and cannot be tapped"
COMPILED = {
    "scripted": ([{"0", "2", "2.linear", ""}], PART),
    "traced": ([{"0", "2", "2.linear", ""}], PART),
    "copied": ([], "a model is compiled by torch.jit, and cannot be tapped"),
}


@pytest.mark.parametrize("how", [*WAYS, *COMPILED])
def test_models_are_found_however_they_were_put_together(how, run_once, untapped_once):
    ways = list(WAYS) if how in WAYS else [how]
    argv = harness.python("assembled.py", *ways)
    outcome = run_once(argv, "**").expect(0)
    assert len(outcome.losses) == 2 * len(ways)
    assert outcome.losses == untapped_once(argv).losses
    run = captures.expect_sound(outcome.run)
    expected, said = COMPILED.get(how) or (WAYS[how], "")
    assert (said in outcome.err) if said else "torch.jit" not in outcome.err
    records = [r for r in run.records if r.step == 2 * ways.index(how) + 1]
    models = {r.model for r in records}
    assert [{r.module for r in records if r.model == m} for m in sorted(models)] == expected
    assert {(r.micro, r.call) for r in records} <= {(0, 0)}
    assert "taps are off" not in outcome.err


def test_what_a_job_makes_in_every_step_is_all_that_is_looked_at():
    outcome = harness.run(harness.python("looks.py", str(harness.HOME))).expect(0)
    lines = [line.split() for line in outcome.out.splitlines()]
    looks = [(what, sorted(map(int, counts))) for what, *counts in lines]
    assert looks == [
        ("first", [4, 5]),
        ("inline", [1]),
        ("inline", [1]),
        ("nothing", []),
        ("inserted", [4, 6]),
        ("replaced", [4, 6]),
    ]
