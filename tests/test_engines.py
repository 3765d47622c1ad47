"""Several DeepSpeed engines in one job: each has its parameters and gradients, offloaded and frozen ones too."""

import engines
import flexmodel
import pytest

import captures
import harness

VARIANTS = ["1", "2-offload", "3", "3-offload"]
ARGV = harness.on_ranks("engines.py", *VARIANTS)
HOOKS = "**:param,grad;2:forward"


@pytest.fixture(scope="module")
def expected():
    """By model and name of the parameter, kind, and step."""
    models, found = engines.build(), {}
    optimizers = [engines.optimizer_of(model) for model in models]
    for step in range(engines.STEPS):
        for number, model in enumerate(models):
            for name, parameter in model.named_parameters():
                found[number, name, "param", step] = parameter.detach().clone()
        for model in models:
            model.zero_grad()
        for rank in range(2):
            for loss in engines.losses_of(models, engines.batch(step, rank)):
                (loss / 2).backward()
        for number, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    found[number, name, "grad", step] = parameter.grad.clone()
            optimizer.step()
    return found


def test_losses_are_bitwise_those_of_the_untapped_job(run_once, untapped_once):
    assert run_once(ARGV, HOOKS).expect(0).losses == untapped_once(ARGV).losses


@pytest.mark.parametrize("place", range(len(VARIANTS)), ids=VARIANTS)
def test_every_engine_has_whole_parameters_and_gradients(place, run_once, expected):
    run = captures.expect_sound(run_once(ARGV, HOOKS).expect(0).run)
    first = place * engines.STEPS
    found = {
        (r.model - 2 * place, r.module, r.kind, r.step - first): r.tensor()
        for r in run.records
        if r.kind in ("param", "grad") and r.model // 2 == place
    }
    assert not any(number == 1 and kind == "grad" and name in engines.FROZEN for number, name, kind, _ in found)
    captures.expect_close(found, expected)


def test_the_second_engine_is_known_as_one(run_once):
    """Activations say so too: the batch is over the ranks because the engine says it, not because it is supposed."""
    run = flexmodel.open(run_once(ARGV, HOOKS).expect(0).run)
    records = [r for r in run.records if r.kind == "forward"]
    assert {r.model for r in records} == set(range(2 * len(VARIANTS)))
    assert all(r.shape == (2 * engines.ROWS, 4) for r in records)
    assert all(axis.input_digest is None for r in records for axis in r.layout)
