"""Packed and quantized parameters are refused by name, and what only looks like one is captured."""

import flexmodel
import packed
import pytest
import torch

import captures
import harness

ARGV = harness.python("packed.py")


@pytest.fixture(scope="module")
def outcome(run_once):
    return run_once(ARGV, "**:forward,param,grad").expect(0)


@pytest.fixture(scope="module")
def run(outcome):
    return captures.expect_sound(outcome.run)


def test_the_job_computes_what_it_does_untapped(outcome, untapped_once):
    assert outcome.losses == untapped_once(ARGV).losses
    assert len(outcome.losses) == packed.STEPS


WHY = {
    "ao": "a quantized tensor",
    "wrapper": "a tensor subclass without storage of its own",
    "sparse": "a sparse tensor",
}


@pytest.mark.parametrize("name", packed.packed())
def test_codes_are_refused_with_the_reason(name, run):
    refused = [r for r in run.refused if (r.module, r.kind) == (f"{name}.weight", "param")]
    assert [r.step for r in refused] == list(range(packed.STEPS))
    assert all(r.reason.startswith(WHY.get(name, "a packed or quantized parameter")) for r in refused), refused
    assert f"{name}.weight" not in run.modules
    # What they make is there.
    assert run.get(name, step=0).shape == (4, packed.WIDTH)


def test_nothing_else_is_refused(run):
    assert {r.module for r in run.refused} == {f"{name}.weight" for name in packed.packed()}


@pytest.mark.parametrize("name", [name for name, layer in packed.plain().items() if layer.weight is not None])
def test_values_that_only_look_like_codes_are_captured(name, run):
    value = packed.build().get_submodule(name).weight.detach()
    assert captures.same_bytes(run.get(f"{name}.weight", kind="param", step=0), value.as_subclass(torch.Tensor))


def test_what_a_parameter_is_read_with_is_captured_beside_it(run):
    assert run.get("scaled.scale", kind="param", step=0).tolist() == [1]


def test_a_name_that_is_a_buffers_is_said_to_match_nothing(run_once):
    outcome = run_once(ARGV, "gptq.qweight:param;last").expect(0)
    assert any("gptq.qweight" in line and "match" in line for line in flexmodel.open(outcome.run).notices)
