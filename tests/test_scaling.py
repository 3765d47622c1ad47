"""Gradients say by how much the job scaled its loss, so that they can be held against those of the loss itself."""

import sys
import types

import pytest
import scaled
import tiny
import torch

import captures
import harness
import reference

HOOKS = "layers.0.mlp:forward,backward,backward_pre;lm_head.weight:grad"


SCALES = {
    "scaler": [1024.0, 2048.0, 4096.0],
    "loaded": [1024.0, scaled.LOADED, 2 * scaled.LOADED],
    "deepspeed": [0.5, 0.5, 0.5],
}


@pytest.mark.parametrize("how, scales", SCALES.items())
def test_a_gradient_divided_by_its_loss_scale_is_that_of_the_loss(how, scales, run_once, untapped_once):
    argv = harness.python("scaled.py", how, str(harness.free_port()))
    outcome = run_once(argv, HOOKS).expect(0)
    untapped = untapped_once(argv)
    assert outcome.losses == untapped.losses
    # A value that a device has is not looked at while the scaler works: the job would wait.
    looks = [[line for line in each.out.splitlines() if line.startswith("looks")] for each in (outcome, untapped)]
    assert looks[0] == looks[1] and len(looks[0]) == (0 if how == "deepspeed" else scaled.STEPS)
    run = captures.expect_sound(outcome.run)
    assert {r.loss_scale for r in run.records if r.kind in ("forward", "grad")} == {1.0}
    gradients = [r for r in run.records if r.kind.startswith("backward")]
    assert [r.loss_scale for r in sorted(gradients, key=lambda r: (r.kind, r.step, r.micro))] == scales * 2
    expected = first_gradients()
    found = {r.kind: r.tensor() / r.loss_scale for r in gradients if (r.step, r.micro) == (0, 0)}
    captures.expect_close(found, {kind: expected[kind] for kind in ("backward", "backward_pre")})


def first_gradients() -> dict[str, torch.Tensor]:
    """Of the first loss, in one process, unscaled."""
    model = tiny.build()
    recorder = reference.Recorder(model, "layers.0.mlp".__eq__)
    recorder.forward_pass(0)
    tokens, targets = tiny.batch(0, [4], 0)
    tiny.loss_of(model(tokens), targets).backward()
    assert scaled.STEPS == 3
    return {key.kind: value for key, value in recorder.found.items()}


class Optimizer:
    """As megatron-core's: a scaler, or none, and a scale as a tensor."""

    def __init__(self, scaler: object) -> None:
        self.grad_scaler, self.asked = scaler, 0

    def scale_loss(self, loss: torch.Tensor) -> torch.Tensor:
        self.asked += 1
        return torch.tensor([8.0]) * loss


@pytest.mark.parametrize("scaler, asked", [(None, 2), ("constant", 2), ("dynamic", 4)])
def test_a_scale_of_megatrons_is_not_looked_at_and_one_that_is_constant_is_asked_for_once(scaler, asked, monkeypatch):
    from flexmodel_inside.frameworks import megatron

    class ConstantGradScaler:
        pass

    module = types.SimpleNamespace(ConstantGradScaler=ConstantGradScaler)
    monkeypatch.setitem(sys.modules, megatron._SCALERS, module)
    job = types.SimpleNamespace(scale=lambda value, divisor: (type(value), float(value) / divisor))
    adapter = megatron.Megatron(job)
    optimizer = Optimizer(ConstantGradScaler() if scaler == "constant" else scaler)
    found = [adapter._scale_by(optimizer.scale_loss, divisor) for divisor in (2, 2, 4, 4)]
    # One divisor after another, as where the number of microbatches grows.
    assert found == [(torch.Tensor, 8.0 / divisor) for divisor in (2, 2, 4, 4)]
    assert optimizer.asked == asked
    assert adapter._scale_by(None, 2) == (float, 0.5)
