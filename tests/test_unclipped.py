"""What backward passes have left of gradients, after each microbatch and before anything clips it."""

import left
import pytest
import torch

import captures
import harness

CASES = list(left.CASES)
HOOKS = "**:grad_unclipped,grad;**.weight:param@slice=[0]"
ARGV = harness.on_ranks("left.py", *CASES)


@pytest.fixture(scope="module")
def run(run_once, untapped_once):
    outcome = run_once(ARGV, HOOKS).expect(0)
    assert outcome.losses == untapped_once(ARGV).losses
    return captures.expect_sound(outcome.run)


@pytest.fixture(scope="module")
def expected():
    """What microbatches have left, by parameter, step and microbatch; and what the optimizer uses, by the first two."""
    torch.manual_seed(0)
    model = left.build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    unclipped, used = {}, {}
    for step in range(left.STEPS):
        world = len(left.SIZES)
        sums = {name: [torch.zeros_like(p) for _ in range(world)] for name, p in model.named_parameters()}
        for micro in range(left.MICRO):
            for rank in range(world):
                optimizer.zero_grad()
                left.loss_of(model, step, micro, rank).backward()
                for name, parameter in model.named_parameters():
                    sums[name][rank] += parameter.grad
            reduced = micro == left.MICRO - 1
            for name, parts in sums.items():
                unclipped[name, step, micro] = sum(parts) / (world if reduced else 1)
        for name, parameter in model.named_parameters():
            parameter.grad = unclipped[name, step, left.MICRO - 1].clone()
        torch.nn.utils.clip_grad_norm_(model.parameters(), left.LARGEST)
        used |= {(name, step): p.grad.clone() for name, p in model.named_parameters()}
        optimizer.step()
    return unclipped, used


@pytest.mark.parametrize("case", CASES)
def test_each_microbatch_leaves_the_sum_of_the_ranks_addends_and_the_last_their_mean(case, run, expected):
    number = CASES.index(case)
    records = [r for r in run.records if r.model == number]
    first = min(r.step for r in records)
    found = {(r.module, r.step - first, r.micro): r for r in records if r.kind == "grad_unclipped"}
    assert found.keys() == expected[0].keys()
    assert all(r.train and r.repeat == 0 and r.loss_scale == 1 for r in found.values())
    captures.expect_close({key: r.tensor() for key, r in found.items()}, expected[0])
    for (_, _, micro), record in found.items():
        places = [axis.place for axis in record.layout]
        assert (places == ["partial"]) == (micro < left.MICRO - 1), record
    used = {(r.module, r.step - first): r.tensor() for r in records if r.kind == "grad"}
    captures.expect_close(used, expected[1])


def test_one_is_asked_for_by_its_microbatch(run, expected):
    got = run.get("lm_head.weight", kind="grad_unclipped", step=1, micro=1, model=0)
    captures.expect_close({"": got}, {"": expected[0]["lm_head.weight", 1, 1]})
