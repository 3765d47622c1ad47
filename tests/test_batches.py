"""Batches that the first size of the first tensor does not tell are found, or what is missing is said."""

import batches
import flexmodel
import pytest
import torch

import captures
import harness

CASES = list(batches.CASES)
ARGV = harness.on_ranks("batches.py", *CASES)
RANKS = range(2)


@pytest.fixture(scope="module")
def run(run_once, untapped_once):
    outcome = run_once(ARGV, "**:forward,backward_pre").expect(0)
    assert outcome.losses == untapped_once(ARGV).losses
    return captures.expect_sound(outcome.run)


def outputs(case, name):
    """What a module gives on each rank, by step."""
    model, found = batches.build(case), []
    model.get_submodule(name).register_forward_hook(lambda *call: found.append(call[-1].detach()))
    return [[model(batches.batch(case, step, rank)) is not None and found.pop() for rank in RANKS] for step in range(2)]


def of(run, case, name, step):
    """A case's module in its step."""
    return {"module": name, "step": CASES.index(case) * batches.STEPS + step, "model": CASES.index(case)}


@pytest.mark.parametrize(
    ("case", "name"), [("flat", "gate"), ("flat", "embed"), ("images", "stem"), ("ragged", "users")]
)
def test_rows_are_put_together_in_rank_order(case, name, run):
    for step, parts in enumerate(outputs(case, name)):
        captures.expect_close({0: run.get(**of(run, case, name, step))}, {0: torch.cat(parts)})


def test_a_table_with_a_row_for_each_position_is_one(run):
    table = batches.build("flat").position.weight.detach()
    assert captures.same_bytes(run.get(**of(run, "flat", "position", 0)), table)


@pytest.mark.parametrize(("case", "name", "kind"), [("ragged", "items", "forward"), ("flat", "gate", "backward_pre")])
def test_what_is_not_known_is_kept_apart_and_the_way_out_is_said(case, name, kind, run):
    """Nothing tells rows of a second tensor, nor whether a gradient is that of rows or of a table."""
    where = of(run, case, name, 0)
    with pytest.raises(flexmodel.NotCapturedError, match=r"not known.*shard=DIM@dp"):
        run.get(kind=kind, **where)
    if kind == "forward":
        parts = outputs(case, name)[0]
        captures.expect_close({r: run.get(rank=r, **where) for r in RANKS}, dict(enumerate(parts)))
