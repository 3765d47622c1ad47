"""Accelerate's own ways into FSDP and DeepSpeed: what these shard is whole, as it is in one process."""

import accelerate_sharded
import pytest
import test_parameters
import tiny

import captures
import harness
import reference_parallel

TAPPED = {"embed", "layers.0", "layers.1.attn", "layers.1.mlp", "lm_head"}
HOOKS = "**:param,grad;" + ";".join(f"{name}:forward" for name in sorted(TAPPED))


WAYS = ["fsdp1", "fsdp2", "zero2", "zero3"]
STEPS = accelerate_sharded.STEPS


@pytest.fixture(scope="module")
def expected():
    parameters = test_parameters.whole(tiny.build(), steps=STEPS, sizes=(4, 4))
    run = reference_parallel.sliced(tiny.build(), TAPPED.__contains__, steps=STEPS, sizes=(4, 4))
    return parameters | {key: value for key, value in run.records.items() if key.kind == "forward"}, run.losses


@pytest.mark.parametrize("number", range(len(WAYS)), ids=WAYS)
def test_what_accelerate_wraps_has_the_bytes_of_one_process(number, run_once, expected):
    outcome = run_once(harness.on_ranks("accelerate_sharded.py", *WAYS), HOOKS).expect(0)
    assert outcome.losses[number * STEPS :][:STEPS] == expected[1]
    captures.expect_sound(outcome.run)
    found = captures.read(outcome.run, number)
    captures.expect_equal({k._replace(step=k.step - number * STEPS): v for k, v in found.items()}, expected[0])
