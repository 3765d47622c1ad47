"""Gradients say by how much the job scaled its loss, so that they can be held against those of the loss itself."""

import pytest
import scaled
import tiny
import torch

import captures
import harness
import reference

HOOKS = "layers.0.mlp:forward,backward,backward_pre;lm_head.weight:grad"


@pytest.mark.parametrize("how, scales", [("scaler", [1024.0, 2048.0, 4096.0]), ("deepspeed", [0.5, 0.5, 0.5])])
def test_a_gradient_divided_by_its_loss_scale_is_that_of_the_loss(how, scales, run_once, untapped_once):
    argv = harness.python("scaled.py", how, str(harness.free_port()))
    outcome = run_once(argv, HOOKS).expect(0)
    assert outcome.losses == untapped_once(argv).losses
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
