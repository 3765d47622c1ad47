"""Pipeline parallel: a module is on one stage, and a step's microbatches come out as its whole batch, in order."""

import flexmodel
import pipeline
import pytest

import captures
import harness
import reference_parallel

BLOCK = ["norm1", "attn", "mlp", "mlp.act"]
TAPPED = {"embed", "norm", "lm_head"}
TAPPED |= {f"layers.{i}{name}" for i in range(pipeline.LAYERS) for name in ["", *(f".{part}" for part in BLOCK)]}
HOOKS = ";".join(f"{name}:forward,forward_pre,backward,backward_pre" for name in sorted(TAPPED))
SCHEDULES = ["1F1B", "GPipe"]
ARGV = harness.torchrun("pipeline.py", *SCHEDULES)


@pytest.fixture(scope="module")
def outcome(run_once):
    return run_once(ARGV, HOOKS).expect(0)


@pytest.fixture(scope="module")
def expected():
    steps = pipeline.STEPS
    options = {"steps": steps, "sizes": pipeline.SIZES, "total": reference_parallel.in_turn}
    return [
        reference_parallel.sliced(pipeline.build(), TAPPED.__contains__, first=number * steps, **options)
        for number in range(len(SCHEDULES))
    ]


def test_losses_are_bitwise_those_of_one_process(outcome, expected):
    assert outcome.losses == [loss for whole in expected for loss in whole.losses]


@pytest.mark.parametrize("model", range(len(SCHEDULES)), ids=SCHEDULES)
def test_whole_batches_have_the_bytes_of_one_process(model, outcome, expected):
    captures.expect_sound(outcome.run)
    captures.expect_equal(captures.read(outcome.run, model), expected[model].records)


def test_all_stages_are_in_one_run_and_each_module_is_on_one_rank(outcome):
    ranks = {record.module: record.ranks for record in flexmodel.open(outcome.run).records}
    assert ranks.keys() == TAPPED
    assert ranks["embed"] == ranks["layers.0"] == ranks["layers.1.mlp"] == (0,)
    assert ranks["layers.2.mlp"] == ranks["layers.3"] == ranks["lm_head"] == (1,)
