"""One parameter, module or tensor that raises when it is looked at costs itself: the others are captured."""

import collections

import flexmodel
import interrupts
import marks
import odd_models
import pytest
import torch
from torch.nn.parameter import is_lazy

import captures
import harness

HOOKS = "**:forward,forward_pre,backward,backward_pre,param,grad"


@pytest.fixture(scope="module", params=["eager", "dynamo"])
def outcome(request, run_once):
    return run_once(harness.python("odd_models.py", request.param), HOOKS).expect(0)


@pytest.fixture(scope="module")
def run(outcome):
    return captures.expect_sound(outcome.run)


def tensors_in(output) -> dict[str, torch.Tensor]:
    """What can be looked at of what a module returns, by path."""
    if isinstance(output, odd_models.Pair):
        return {"out.left": output.left, "out.right": output.right}
    if isinstance(output, odd_models.Shy):
        return {"out.value": output.value}
    if isinstance(output, dict):
        return {f"out.{key}": output[key] for key in ("value", "good") if dict.__contains__(output, key)}
    return {"out[2]": output[2]} if isinstance(output, list) else {"out": output}


@pytest.fixture(scope="module")
def expected():
    """By kind, name and path, in the order in which they come: what is not odd."""
    found = collections.defaultdict(list)
    modules = {**dict(odd_models.Odd().named_modules()), "": None}
    names = [*odd_models.PLAIN, *(f"giving.{name}" for name in odd_models.CONTAINERS)]
    assert set(names) < modules.keys()

    def after(name):
        def hook(_module, _args, output):
            for path, tensor in tensors_in(output).items():
                found["forward", name, path].append(tensor.detach().clone())
                if tensor.requires_grad:
                    gradients = found["backward_pre", name, path]
                    tensor.register_hook(lambda g, gradients=gradients: gradients.append(g.detach().clone()))

        return hook

    def watch_parameters():
        odd_models.Touchy.trains = False
        for name, parameter in model.named_parameters():
            if name not in REFUSED and not is_lazy(parameter):
                found["param", name, "param"].append(parameter.data.as_subclass(torch.Tensor).clone())
        odd_models.Touchy.trains = True

    def watch(step):
        watch_parameters()
        odd_models.Touchy.trains = False
        for name, parameter in model.named_parameters():
            if name not in REFUSED and parameter.grad is not None:
                found["grad", name, "grad"].append(parameter.grad.clone())
        odd_models.Touchy.trains = True

    model = odd_models.Odd()
    for name, module in model.named_modules():
        if name in names:
            module.register_forward_hook(after(name))
    watch_parameters()
    with torch.no_grad():
        model(odd_models.batch(99))
    odd_models.Touchy.trains = False
    odd_models.train(model, watch)
    odd_models.Touchy.trains = False
    return {key: values for key, values in found.items() if not any(odd in key[1] for odd in UNNAMED)}


# Parameters that cannot be read.
REFUSED = {"secret.weight", "wrapper.weight", "meta.weight", "sparse.weight"}
# Modules whose names nobody can spell.
UNNAMED = ("zero\0byte", "half\udc80")


def test_the_job_computes_what_it_does_untapped(outcome, untapped_once):
    assert outcome.losses == untapped_once(harness.python("odd_models.py")).losses
    assert len(outcome.losses) == odd_models.STEPS
    assert "taps are off" not in outcome.err


def test_all_that_is_not_odd_is_captured(run, expected):
    found = collections.defaultdict(list)
    for record in sorted(run.records, key=lambda record: record.time_ns):
        found[record.kind, record.module, record.path].append(record.tensor())
    assert len(expected) > 80
    for key, values in expected.items():
        assert len(found[key]) == len(values), key
        assert all(map(captures.same_bytes, found[key], values)), key


def test_what_is_odd_is_counted(run):
    refused = collections.Counter((r.module, r.kind) for r in run.refused if r.kind in ("param", "grad"))
    # Once in the pass before there is an optimizer.
    assert refused == {(name, "param"): 1 + odd_models.STEPS for name in REFUSED}
    assert run.info.totals.refused == len(run.refused)


WHY = {
    "secret.weight": "Rude: tensor_model_parallel",
    "giving.keyed out": "Rude: a key without a name",
    "giving.shy out.hidden": "Rude: hidden",
    "Proud.training": "Rude: training",
    "zero": "a zero byte",
    "half": "surrogates",
}


@pytest.mark.parametrize("name", WHY)
def test_what_is_odd_is_named_with_the_reason(name, run):
    assert any(name in line and WHY[name] in line for line in run.notices), run.notices


def test_a_mark_of_megatrons_without_megatron_is_no_mesh(run_once, untapped_once):
    argv = harness.on_ranks("marks.py")
    outcome = run_once(argv, "**:forward,param,grad").expect(0)
    assert sorted(outcome.losses) == sorted(untapped_once(argv).losses)
    assert "taps are off" not in outcome.err
    run = flexmodel.open(outcome.run)
    for rank in range(2):
        model, values = marks.build(rank), {}

        def watch(step, model=model, values=values):
            for name, parameter in model.named_parameters():
                values[name, "param", step] = parameter.detach().clone()
                values[name, "grad", step] = parameter.grad.clone()

        marks.train(model, rank, watch)
        for (name, kind, step), value in values.items():
            assert captures.same_bytes(run.get(name, kind=kind, step=step, rank=rank), value)


def test_what_a_handler_of_the_jobs_raises_reaches_the_job(run_once, untapped_once):
    argv = harness.python("interrupts.py")
    outcome = run_once(argv, HOOKS).expect(0)
    names = [(case, raised.__name__) for case in interrupts.CASES for raised in interrupts.SIGNALS.values()]
    assert _cases(untapped_once(argv)) == [(*name, "nothing") for name in names]
    assert _cases(outcome) == [(*name, name[1]) for name in names]
    assert "taps are off" not in outcome.err
    losses = collections.Counter(r.model for r in flexmodel.open(outcome.run).records if r.kind == "grad" and r.step)
    assert len(losses) == len(names)


def _cases(outcome) -> list[tuple[str, ...]]:
    return [tuple(line.split()[1:]) for line in outcome.out.splitlines() if line.startswith("case ")]
