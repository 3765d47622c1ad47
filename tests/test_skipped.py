"""Steps that frameworks skip, since gradients are not finite: they end the step, and their gradients are there."""

import megatron_skips
import pytest
import torch
import zero_skips

import captures
import harness

WEIGHT = "layers.0.mlp.up.weight"
ZERO = ("0-fp16", "1-fp32", "2-fp16", "3-bf16")
JOBS = {
    "zero": (harness.torchrun("zero_skips.py", *ZERO), f"embed;{WEIGHT}:param,grad"),
    "megatron": (harness.on_ranks("megatron_skips.py", ranks=1), "0;0.weight:param,grad"),
}
# The job, the number of the model, the module, its parameter and the rate at which it learns.
CASES = [
    *(("zero", number, "embed", WEIGHT, 0.1) for number in range(len(ZERO))),
    ("megatron", 0, "0", "0.weight", 0.5),
]
STEPS, BROKEN = zero_skips.STEPS, zero_skips.BROKEN
assert (STEPS, BROKEN) == (megatron_skips.STEPS, megatron_skips.BROKEN)


@pytest.mark.parametrize(("job", "number", "module", "weight", "rate"), CASES, ids=[*ZERO, "megatron"])
def test_a_step_that_is_skipped_ends_the_step_and_has_its_gradient(job, number, module, weight, rate, run_once):
    run = captures.expect_sound(run_once(*JOBS[job]).expect(0).run)
    of_model = [r for r in run.records if r.model == number]
    first = number * STEPS
    assert sorted((r.step - first, r.micro) for r in of_model if r.module == module) == [(n, 0) for n in range(STEPS)]
    params, grads = (
        {r.step - first: r for r in of_model if r.module == weight and r.kind == kind} for kind in ("param", "grad")
    )
    assert sorted(params) == sorted(grads) == list(range(STEPS))
    assert [step for step, record in grads.items() if record.skipped] == [BROKEN]
    assert not any(record.skipped for record in params.values())
    values = {step: record.tensor().float() for step, record in params.items()}
    for step in range(STEPS - 1):
        gradient = grads[step].tensor()
        assert gradient.dtype == torch.float32 and gradient.shape == values[step].shape
        if step == BROKEN:
            assert not gradient.isfinite().all()
            assert captures.same_bytes(values[step], values[step + 1])
        else:
            # Copies that the optimizer has are exact, and parameters are rounded.
            expected = values[step] - rate * gradient
            assert gradient.abs().max() > 0
            assert torch.allclose(values[step + 1], expected, atol=0.01 * expected.abs().max().item())
