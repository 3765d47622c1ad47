"""Ranks that do not all do the same: one pass of theirs is one record, what is not is apart, and nothing is missing."""

import collections

import flexmodel
import pytest
import schedules
import torch

import harness

SEEDS = range(6)
TOGETHER = ("train", "accumulate", "evaluate")


@pytest.fixture(scope="module")
def run(run_once, untapped_once):
    """One job with the schedules of all seeds; its losses are those of the untapped job."""
    job = harness.on_ranks("schedules.py", *map(str, SEEDS), ranks=schedules.WORLD)
    outcome = run_once(job, "0:forward_pre,forward,backward_pre;0.weight:param,grad").expect(0)
    assert outcome.losses == untapped_once(job).losses
    return flexmodel.open(outcome.run)


def rows(record):
    """The passes and ranks that the rows of an input are of."""
    return [tuple(map(int, row[:2])) for row in record.tensor()]


def made(seed):
    """The passes of a schedule with the ranks that make each."""
    return {number: (name, by) for name, number, by in schedules.schedule(seed) if name not in ("barrier", "step")}


def test_no_whole_is_made_of_two_passes(run):
    inputs = [record for record in run.records if record.kind == "forward_pre"]
    assert all(record.complete for record in inputs), [record for record in inputs if not record.complete]
    for record in inputs:
        passes = {number for number, _ in rows(record)}
        assert len(passes) == 1 or record.assumed, (record, rows(record))


def test_every_pass_is_there_with_the_rows_of_the_ranks_that_made_it(run):
    found = collections.Counter()
    for record in run.records:
        if record.kind == "forward_pre" and not record.assumed:
            found[tuple(rows(record))] += 1
    for seed in SEEDS:
        assumed = {number for number, (name, _) in made(seed).items() if name in ("evaluate", "sample", "attack")}
        for number, (name, by) in made(seed).items():
            want = tuple((number, rank) for rank in by for _ in range(schedules.ROWS))
            assert found[want] or number in assumed, (seed, name, number, by)
    parts = sum(len(record.ranks) for record in run.records if record.kind == "forward_pre")
    assert parts == sum(len(by) for seed in SEEDS for _, by in made(seed).values()) + sum(seed % 2 for seed in SEEDS)


def test_wholes_are_those_of_one_process(run):
    """Outputs are of the model as it was: DDP's, which all ranks have alike."""
    by_input = {(r.model, r.step, r.micro, r.train, r.apart): r for r in run.records if r.kind == "forward_pre"}
    weights = {(r.model, r.step): r.tensor() for r in run.records if r.kind == "param"}
    bias = schedules.build()[0].bias.detach()
    first = min(step for _, step in weights)
    for record in run.records:
        if record.kind == "forward" and record.step == first and record.train:
            x = by_input[record.model, record.step, record.micro, record.train, record.apart].tensor()
            weight = weights[record.model, record.step]
            assert torch.equal(record.tensor(), torch.nn.functional.linear(x, weight, bias)), record


def test_parameters_are_those_of_the_model_that_all_ranks_have(run):
    own = 0
    for record in run.records:
        if record.kind in ("param", "grad"):
            assert record.complete and (record.ranks == (0, 1)) == (record.apart is None), record
            own += record.apart == 1
    assert own == sum(seed % 2 for seed in SEEDS), "those of the models that rank 1 alone has"
    assert not run.divergences and not run.problems
