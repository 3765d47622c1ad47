"""Quantisation-aware training in eager mode: torch moves hooks from module to module, where nobody registered them.

Argument: `plain`, or `dynamo` to have torch.compile imported. Also moves hooks by hand, in every way that torch takes.
"""

import copy
import sys
import warnings

import tiny
import torch
from torch import nn

STEPS = 3


class Wrapped(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


def build() -> nn.Module:
    from torch.ao.quantization import DeQuantStub, QuantStub

    torch.manual_seed(0)
    return nn.Sequential(
        QuantStub(), nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.Conv1d(4, 1, 3), DeQuantStub()
    )


def batch(step: int):
    return torch.randn(4, 2, 8, generator=torch.Generator().manual_seed(step))


def train(model, first: int, steps: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(first, first + steps):
        loss = model(batch(step)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        tiny.report(0, step, loss)


def quantized() -> None:
    from torch.ao.quantization import convert, fuse_modules, fuse_modules_qat, get_default_qat_qconfig, prepare_qat

    model = build()
    train(model, 0, 1)
    model = fuse_modules_qat(model, [["1", "2", "3"]])
    model.qconfig = get_default_qat_qconfig("x86")
    model = prepare_qat(model)
    train(model, 1, 2)
    converted = convert(model.eval())
    print("converted", float(converted(batch(3)).mean()).hex())
    inplace = build()
    train(inplace, 0, 1)
    fuse_modules(inplace.eval(), [["1", "2", "3"]], inplace=True)
    print("fused", float(inplace(batch(3)).mean()).hex())


def moved() -> None:
    """Every hook of one module on another, which takes other arguments."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    x = torch.ones(2, 4)
    model(x)
    for with_kwargs in (False, True):
        for always_call in (False, True):
            other = Wrapped(nn.Identity())
            for hook in list(model[0]._forward_pre_hooks.values()):
                other.register_forward_pre_hook(hook, with_kwargs=with_kwargs)
                other.register_forward_pre_hook(copy.copy(hook), with_kwargs=with_kwargs, prepend=True)
            for hook in list(model[0]._forward_hooks.values()):
                other.register_forward_hook(hook, with_kwargs=with_kwargs, always_call=always_call)
                other.inner.register_full_backward_hook(hook)
            print("moved", with_kwargs, always_call, float(other(x).sum()), float(other(input=x).sum()))
    hooks = [*model[0]._forward_hooks.values(), *model[0]._forward_pre_hooks.values()]
    calls = [
        (), (1,), (model[0],), (model[0], (x,)), (model[0], x, x), (model[0], (x,), x), (model[0], (x,), {}, x, x),
        (model[1], (x,), {}), (model[1], (x,), {}, x), (None, None, None), (None, None, None, None), (x, x, x, x),
        (model[0], [x], {}), (model[0], (x,), None), (model[0], x, {}, x),
    ]  # fmt: skip
    for hook in hooks:
        for args in calls:
            for kwargs in ({}, {"kwargs": {}}, {"module": model[0], "args": (x,), "kwargs": {}}):
                assert hook(*args, **kwargs) is None, (args, kwargs)
        str(hook), repr(hook), hash(hook), hook == hook, hook.__name__, hook.__doc__, copy.deepcopy(hook)
    # Its own hooks are still where they were.
    print("own", float(model(x).sum()))
    # As nn.DataParallel has it run, a copy that shares the hooks.
    replica = model[0]._replicate_for_data_parallel()
    replica.weight, replica.bias = (p.detach() for p in model[0].parameters())
    print("replica", float(replica(x).sum()))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    if sys.argv[1] == "dynamo":
        import torch._dynamo
    quantized()
    moved()
