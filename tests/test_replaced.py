"""What we put in the place of a function, and the hooks that we give torch, behave as if we were not there."""

import flexmodel
import fused
import pytest
import steps

import captures
import harness


def test_replaced_functions_are_called_in_every_way(run_once, untapped_once):
    """Results, exceptions, and what they say of themselves."""
    argv = harness.python("replaced.py", "1")
    outcome = run_once(argv, "**:forward,backward,param,grad").expect(0)
    ours, theirs = outcome.out.splitlines(), untapped_once(argv).out.splitlines()
    different = [(a, b) for a, b in zip(ours, theirs, strict=True) if a != b]
    assert not different and len(ours) > 1400
    assert sum(" gave " in line for line in ours) > 200
    assert sum(" raised " in line for line in ours) > 600
    assert "taps are off" not in outcome.err


@pytest.mark.parametrize("how", ["plain", "dynamo"])
def test_hooks_that_are_moved_to_other_modules_do_nothing(how, run_once, untapped_once):
    argv = harness.python("fused.py", how)
    hooks = "1:forward,forward_pre,backward_pre;3:forward;4:forward,backward;0:forward,forward_pre"
    outcome = run_once(argv, hooks).expect(0)
    assert outcome.out == untapped_once(argv).out
    assert "taps are off" not in outcome.err
    run = captures.expect_sound(outcome.run)
    # The model as it was made, prepared, converted, and so on: each is one of its own.
    seen = [(r.model, r.module, r.step, r.micro, r.call) for r in run.records if r.kind == "forward"]
    assert len(seen) == len(set(seen))
    last = max(model for model, *_ in seen)
    assert sorted(name for model, name, *_ in seen if model == last) == ["0", "0", "0", "1", "1"]
    model = fused.build()
    output = {}
    model[1].register_forward_hook(lambda module, args, value: output.setdefault(0, value.detach().clone()))
    model(fused.batch(0))
    first = next(r for r in run.records if (r.model, r.module, r.kind, r.step) == (0, "1", "forward", 0))
    assert captures.same_bytes(first.tensor(), output[0])


@pytest.fixture(scope="module")
def stepped(run_once):
    return run_once(harness.python("steps.py"), "**:param,grad").expect(0)


def test_what_a_step_is_given_reaches_it(stepped, untapped_once):
    assert stepped.out == untapped_once(harness.python("steps.py")).out
    assert "taps are off" not in stepped.err


def test_gradients_are_those_that_the_step_used(stepped):
    run = flexmodel.open(stepped.run)
    found = {(r.model, r.step): r.tensor().double().sum().item() for r in run.records if r.kind == "grad"}
    used = [line.split()[1:] for line in stepped.out.splitlines() if line.startswith("grad ")]
    models = sorted({model for model, _ in found})
    assert len(models) == len(steps.USING)
    assert list(dict.fromkeys(name for name, _ in used)) == steps.USING
    values = [value for _, value in sorted(found.items())]
    assert [value.hex() for value in values] == [value for _, value in used]
