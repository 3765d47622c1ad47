"""Ranks that do not all do the same: what is complete is what one process computes, nothing is missing, and what is not
complete says why."""

import collections
import functools
import json

import flexmodel
import pytest
import schedules
import torch
from reference_schedules import PARAMETER, Reference
from schedules import WORLD

import captures
import harness

ATTEMPTS = (range(4), range(4, 8), range(8, 40))
"""The seeds of each. A rank fails in the last schedule of those before the last."""
HOOKS = f"0:forward_pre,forward;2:forward,backward;{PARAMETER}:param,grad,grad_unclipped"
FIELDS = {
    ("0", "forward_pre"): "given",
    ("0", "forward"): "hidden",
    ("2", "forward"): "out",
    ("2", "backward"): "gradient",
}
TRAINING = ("train", "accumulate", "join")

draw = functools.cache(schedules.draw)
reference = functools.cache(lambda attempt, seed: Reference(draw(seed), attempt))


class Told:
    """A run, and what its ranks say that they did, by attempt and rank."""

    def __init__(self, outcome: harness.Outcome) -> None:
        self.run = captures.expect_sound(outcome.run)
        lines = [line.partition("DIARY ")[2] for line in outcome.out.splitlines() if "DIARY " in line]
        self.lines = collections.defaultdict(list)
        # The event and turn of a pass, and of the step of an optimizer, by the numbers that a rank counts.
        self.passes, self.steps = {}, {}
        for line in map(json.loads, lines):
            who = line["attempt"], line["rank"]
            self.lines[who].append(line)
            of, at = (*who, line["seed"], line["model"], line["step"]), (line["index"], line["turn"])
            if line["what"] == "begin":
                self.passes[(*of, line["micro"], line["train"])] = at
            elif line["what"] == "step":
                self.steps[of] = at
        # The schedule and the model that a number means, by attempt and the rank that counts so.
        self.models = {}
        for record in self.of_kind("forward_pre"):
            _, seed, number, _ = name_of(record, record.ranks[0])
            key = *self.counted_by(record), record.model
            named = seed, pass_of(seed, number).model
            assert self.models.setdefault(key, named) == named, record

    def of_kind(self, kind: str) -> list:
        return [record for record in self.run.records if record.kind == kind]

    def counted_by(self, record) -> tuple[int, int]:
        """The attempt, and the rank whose numbers a record has."""
        return record.attempt, record.ranks[0] if record.apart is None else record.apart

    def model_of(self, record) -> tuple[int, str]:
        return self.models[(*self.counted_by(record), record.model)]

    def pass_of(self, record) -> tuple[int, int]:
        """The event and turn that a record is of, by the numbers of its lowest rank."""
        of = *self.counted_by(record), *self.model_of(record), record.step
        if record.kind == "grad":
            return self.steps[of]
        if record.kind == "param":
            # The rank may have made no pass in the step, and have stepped all the same.
            return next((at for key, at in self.passes.items() if key[:5] == of), None) or self.steps[of]
        return self.passes[(*of, record.micro, record.train)]


def name_of(record, rank: int) -> tuple[int, ...]:
    """Attempt, seed, number and rank of the pass that a rank's rows say they are of."""
    (row, *others) = record.part(rank)[:, :4].mul(64).round().int().tolist()
    assert all(other == row for other in others), record
    return tuple(row)


def pass_of(seed: int, number: int) -> schedules.Event:
    """The event that a pass is of."""
    made = [event for event in draw(seed).events if event.name not in ("barrier", "step")]
    return next(event for event in reversed(made) if event.number <= number)


@pytest.fixture(scope="module")
def told(run_once):
    """One job, whose ranks are started again twice, with the schedules of all seeds."""
    argv = ["torchrun", "--standalone", "--nproc-per-node", str(WORLD), "--max-restarts", str(len(ATTEMPTS) - 1)]
    argv += [str(harness.PROGRAMS / "schedules.py"), *(",".join(map(str, seeds)) for seeds in ATTEMPTS)]
    outcome = run_once(argv, HOOKS, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1").expect(0)
    (losses,) = [line.split()[1:] for line in outcome.out.splitlines() if line.startswith("LOSSES")]
    last = len(ATTEMPTS) - 1
    assert losses == [float(x).hex() for seed in ATTEMPTS[last] for x in reference(last, seed).losses[0]]
    return Told(outcome)


def test_what_is_complete_is_what_one_process_computes(told):
    """Bytes, but for gradients that are summed over ranks."""
    checked = collections.Counter()
    for record in told.run.records:
        if record.complete:
            checked[record.module, record.kind] += 1
            whole, (seed, _) = record.tensor(), told.model_of(record)
            made, at = reference(record.attempt, seed), told.pass_of(record)
            if record.kind == "grad":
                assert captures.close(whole, made.used[at]) and record.skipped == (at in made.skipped), record
            elif record.kind == "grad_unclipped":
                assert captures.close(whole, made.left_on(at, record.ranks)), record
            elif record.kind == "param":
                assert captures.same_bytes(whole, made.parameter(*at, record.ranks[0])), record
            else:
                expect_rows(record, whole, made, at)
    assert len(checked) == 7 and min(checked.values()) > 100, checked


def expect_rows(record, whole: torch.Tensor, made: Reference, at: tuple[int, int]) -> None:
    """The rows of a pass, one rank's after the other's. Ranks of which it is only assumed that they made it together
    may have made two."""
    field = FIELDS[record.module, record.kind]
    rows = dict(zip(record.ranks, whole.split([record.part(rank).shape[0] for rank in record.ranks]), strict=True))
    for rank, own in rows.items():
        free = record.assumed and rank != record.ranks[0]
        these = [each for key, each in made.passes.items() if key[2] == rank and (free or key[:2] == at)]
        values = [(each, getattr(each, field)) for each in these]
        fitting = [each for each, value in values if value is not None and captures.same_bytes(own, value.detach())]
        assert fitting, (record, rank)
        if record.kind == "backward":
            assert any(each.scale == record.loss_scale for each in fitting), record


def test_nothing_that_was_captured_is_missing(told):
    """What was under way when a failing job was ended may be there, too."""
    expected, found = collections.Counter(), collections.Counter()
    for (attempt, rank), lines in told.lines.items():
        trained, with_param, with_grad, called = set(), set(), set(), set()
        for line in lines:
            name = draw(line["seed"]).events[line["index"]].name
            model = line["seed"], line["model"]
            step = *model, line["step"]
            kinds = []
            if line["what"] == "end":
                called.add(model)
                kinds += [("0", "forward_pre"), ("0", "forward"), ("2", "forward")]
                kinds += [("2", "backward")] if line["train"] else []
                kinds += [(PARAMETER, "grad_unclipped")] if name in TRAINING else []
                # Of a model that has trained, parameters are those of passes that do.
                trained |= {model} if line["train"] else set()
                if (line["train"] or model not in trained) and step not in with_param:
                    with_param.add(step)
                    kinds.append((PARAMETER, "param"))
            elif line["what"] == "step" and model in called:
                # An optimizer may step though its rank made no pass: that is no step of its own.
                kinds += [(PARAMETER, "grad")] if step not in with_grad else []
                kinds += [(PARAMETER, "param")] if step not in with_param else []
                with_grad.add(step)
                with_param.add(step)
            expected.update((attempt, rank, *kind) for kind in kinds)
    for record in told.run.records:
        found.update((record.attempt, rank, record.module, record.kind) for rank in record.ranks)
    under_way = {key: int(key[0] < len(ATTEMPTS) - 1) for key in expected | found}
    wrong = {key: (found[key], expected[key]) for key in under_way
             if not 0 <= found[key] - expected[key] <= under_way[key]}  # fmt: skip
    assert not wrong, f"found and expected: {wrong}"
    assert not any(record.again for record in told.run.records)


def test_each_pass_is_there_once_on_each_rank_that_made_it(told):
    found = collections.Counter(
        name_of(record, rank) for record in told.of_kind("forward_pre") for rank in record.ranks
    )
    for (attempt, rank), lines in told.lines.items():
        numbers = [(line["seed"], draw(line["seed"]).events[line["index"]].number + line["turn"]) for line in lines
                   if line["what"] == "end"]  # fmt: skip
        for (seed, number), count in collections.Counter(numbers).items():
            assert found[attempt, seed, number, rank] == count, (attempt, rank, seed, number)


def test_what_is_not_complete_says_why(told):
    reasons = collections.Counter()
    for record in told.run.records:
        assert (record.reason is None) == record.complete and not record.pending, record
        if not record.complete:
            reasons[record.reason.partition(str(record))[2].lstrip(": ").partition(" ")[0]] += 1
            with pytest.raises(flexmodel.NotCapturedError) as raised:
                record.tensor()
            assert record.reason in str(raised.value)
            assert all(record.part(rank).numel() >= 0 for rank in record.ranks)
            assert record.kind in ("param", "grad", "grad_unclipped"), "activations are whole for whoever made them"
    assert len(reasons) > 1, reasons
    assert not told.run.divergences


def test_a_pass_that_all_ranks_made_through_a_wrapper_is_one(told):
    records = {name_of(record, rank): record for record in told.of_kind("forward_pre") for rank in record.ranks}
    checked = collections.Counter()
    for attempt, seeds in enumerate(ATTEMPTS):
        for seed in seeds[:-1] if attempt < len(ATTEMPTS) - 1 else seeds:
            for event in draw(seed).events:
                if draw(seed).wrapper != "hand" and event.name in TRAINING:
                    turns = min(event.rows) if event.name == "join" else 1
                    for number in range(event.number, event.number + turns):
                        record = records[attempt, seed, number, 0]
                        assert record.ranks == schedules.EVERYONE and record.apart is None, record
                        assert record.complete and not record.assumed, record
                        checked[draw(seed).wrapper, event.name] += 1
                if event.name in ("sample", "attack"):
                    record = records[attempt, seed, event.number, event.ranks[0]]
                    assert record.apart == event.ranks[0] or record.assumed, record
                    checked[event.name, event.model] += 1
    assert len(checked) >= 13, checked
