"""Accelerate's offloading: its hooks on the modules that we tap load weights for a call, and take them away again."""

import offload
import pytest
import tiny
import torch

import captures
import harness
import reference

TAPPED = {"embed", "norm", "lm_head"}
TAPPED |= {f"layers.{i}{name}" for i in range(2) for name in ("", ".norm1", ".attn", ".attn.qkv", ".mlp", ".mlp.act")}
HOOKS = ";".join(f"{name}:forward,forward_pre" for name in sorted(TAPPED))


@pytest.fixture(scope="module")
def argv(tmp_path_factory):
    return harness.python("offload.py", str(tmp_path_factory.mktemp("offload")))


@pytest.fixture(scope="module")
def expected():
    model = offload.build()
    recorder = reference.Recorder(model, TAPPED.__contains__)
    for call in range(offload.CALLS):
        recorder.forward_pass(call, 0, train=False)
        with torch.no_grad():
            model(tiny.batch(call, [4], 0)[0])
    return recorder.found


def test_the_job_is_the_untapped_one_and_its_weights_are_offloaded_again(argv, run_once, untapped_once):
    outcome = run_once(argv, HOOKS).expect(0)
    assert outcome.out == untapped_once(argv).out
    assert outcome.out.count("layers.1.mlp.up.weight") == 2


@pytest.mark.parametrize("model", [0, 1], ids=["cpu", "disk"])
def test_whole_tensors_have_the_bytes_of_the_model_in_memory(model, argv, run_once, expected):
    outcome = run_once(argv, HOOKS).expect(0)
    captures.expect_sound(outcome.run)
    captures.expect_equal(captures.read(outcome.run, model), expected)
