"""Pipeline parallel: a module is on one stage, and a step's microbatches come out as its whole batch, in order."""

import flexmodel
import pipeline
import pytest
import torch

import captures
import harness
import reference_parallel

BLOCK = ["norm1", "attn", "mlp", "mlp.act"]
TAPPED = {"embed", "norm", "lm_head"}
TAPPED |= {f"layers.{i}{name}" for i in range(pipeline.LAYERS) for name in ["", *(f".{part}" for part in BLOCK)]}
HOOKS = ";".join(f"{name}:forward,forward_pre,backward,backward_pre" for name in sorted(TAPPED))
SCHEDULES = ["1F1B", "GPipe"]


@pytest.fixture(scope="module")
def expected():
    return reference_parallel.sliced(
        pipeline.build(),
        TAPPED.__contains__,
        steps=pipeline.STEPS,
        sizes=pipeline.SIZES,
        total=reference_parallel.in_turn,
    )


def whole_batches(found: dict) -> dict:
    """Microbatches of one step side by side, in order."""
    joined: dict = {}
    for key in sorted(found):
        joined.setdefault(key._replace(micro=0), []).append(found[key])
    return {key: torch.cat(parts) for key, parts in joined.items()}


def test_losses_are_bitwise_those_of_the_untapped_job(run_once, untapped_once, expected):
    untapped = iter(untapped_once(harness.torchrun("pipeline.py", *SCHEDULES)).losses)
    for schedule in SCHEDULES:
        outcome = run_once(harness.torchrun("pipeline.py", schedule), HOOKS).expect(0)
        assert outcome.losses == [next(untapped) for _ in range(pipeline.STEPS)] == expected.losses, schedule


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_whole_batches_have_the_bytes_of_one_process(schedule, run_once, expected):
    outcome = run_once(harness.torchrun("pipeline.py", schedule), HOOKS).expect(0)
    captures.expect_sound(outcome.run)
    captures.expect_equal(whole_batches(captures.read(outcome.run)), expected.records)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_all_stages_are_in_one_run_and_each_module_is_on_one_rank(schedule, run_once):
    outcome = run_once(harness.torchrun("pipeline.py", schedule), HOOKS).expect(0)
    ranks = {record.module: record.ranks for record in flexmodel.open(outcome.run).records}
    assert ranks.keys() == TAPPED
    assert ranks["embed"] == ranks["layers.0"] == ranks["layers.1.mlp"] == (0,)
    assert ranks["layers.2.mlp"] == ranks["layers.3"] == ranks["lm_head"] == (1,)
