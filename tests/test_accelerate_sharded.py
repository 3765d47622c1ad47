"""Accelerate's own ways into FSDP and DeepSpeed: what these shard is whole, as it is in one process."""

import accelerate_sharded
import flexmodel
import pytest
import test_parameters
import tiny

import captures
import harness
import reference_parallel

TAPPED = {"embed", "layers.0", "layers.1.attn", "layers.1.mlp", "lm_head"}
HOOKS = "**:param,grad;" + ";".join(f"{name}:forward" for name in sorted(TAPPED))


@pytest.fixture(scope="module")
def expected():
    parameters = test_parameters.whole(tiny.build(), steps=accelerate_sharded.STEPS, sizes=(4, 4))
    run = reference_parallel.sliced(tiny.build(), TAPPED.__contains__, steps=accelerate_sharded.STEPS, sizes=(4, 4))
    return parameters | {key: value for key, value in run.records.items() if key.kind == "forward"}, run.losses


WRAPPERS = {"fsdp1": "FSDP1", "fsdp2": "FSDP2", "zero2": "DeepSpeed ZeRO-2", "zero3": "DeepSpeed ZeRO-3"}


@pytest.mark.parametrize(("how", "wrapper"), WRAPPERS.items())
def test_what_accelerate_wraps_has_the_bytes_of_one_process(how, wrapper, run_once, expected):
    outcome = run_once(harness.torchrun("accelerate_sharded.py", how), HOOKS).expect(0)
    assert outcome.losses == expected[1]
    captures.expect_sound(outcome.run)
    assert flexmodel.open(outcome.run).info.wrapper == wrapper
    captures.expect_equal(captures.read(outcome.run), expected[0])
