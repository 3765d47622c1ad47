"""One model, most of whose parts are odd: parameters, modules and tensors that raise when they are looked at.

Each of them works in the job, which looks at nothing that it does not need. `PLAIN` names the modules that are not odd,
or odd only in what nobody needs to look at.
"""

import sys
import warnings
from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import tiny
import torch
import torch.nn.functional as F
from torch import nn

STEPS, WIDTH, ROWS = 3, 6, 4


class Rude(BaseException):
    """What some classes raise that think nobody should catch it."""


class Proud(nn.Linear):
    """Once it is made, its properties and whatever else it is asked for raise."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.is_made = True

    @property
    def batch_first(self):
        raise Rude("batch_first")

    @property
    def training(self):
        raise Rude("training")

    @training.setter
    def training(self, value):
        pass

    @property
    def layer_number(self):
        raise RuntimeError("layer_number")

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError as e:
            raise Rude(name) if "is_made" in vars(self) else e from None

    def __repr__(self):
        raise Rude("repr")


class Falsy(nn.Linear):
    """Empty, false, and equal to nothing in particular."""

    def __len__(self):
        return 0

    def __bool__(self):
        raise RuntimeError("neither true nor false")

    def __eq__(self, other):
        return torch.zeros(2, dtype=torch.bool)

    __hash__ = nn.Linear.__hash__


class Disguised(nn.Linear):
    """Says that it is a number, and takes hooks in its own way."""

    __module__ = None

    @property
    def __class__(self):
        return int

    def register_forward_hook(self, hook):
        return super().register_forward_hook(hook)


class Touchy(nn.Parameter):
    """Once the job trains, functions of torch's on it raise, but for the one that it calls."""

    trains = False

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if cls.trains and function is not F.linear:
            raise RuntimeError(f"{function} on a touchy parameter")
        return super().__torch_function__(function, types, args, kwargs or {})


class Secret(nn.Parameter):
    """An attribute that raises."""

    @property
    def tensor_model_parallel(self):
        raise Rude("tensor_model_parallel")


class Wrapper(torch.Tensor):
    """Made of another tensor, and no operation is for it."""

    @staticmethod
    def __new__(cls, inner):
        self = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        self.inner = inner
        self._is_param = True
        return self

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise Rude(str(function))


class WithParameter(nn.Module):
    """Adds a frozen parameter of some kind to what it is given, in its own way."""

    def __init__(self, parameter, use):
        super().__init__()
        self.register_parameter("weight", parameter)
        self.use = use

    def forward(self, x):
        return x + self.use(x, self.weight)


def marked(module: nn.Module) -> nn.Module:
    """As megatron-core marks what it distributes, and others too."""
    for parameter in module.parameters():
        parameter.tensor_model_parallel = parameter.sequence_parallel = True
    return module


Pair = namedtuple("Pair", ["left", "right"])


class NeverIterated(Pair):
    def __iter__(self):
        raise RuntimeError("not iterable")


class Locked(dict):
    """Gives nothing away."""

    def _refuse(self, *_args):
        raise RuntimeError("locked")

    __iter__ = __len__ = keys = values = items = __contains__ = _refuse


class Key:
    def __str__(self):
        raise Rude("a key without a name")


@dataclass
class Shy:
    value: Any
    hidden: Any = None

    def __getattribute__(self, name):
        if name == "hidden":
            raise Rude("hidden")
        return super().__getattribute__(name)


class Closed:
    """Neither what it is nor what it has is anybody's business."""

    def __getattribute__(self, name):
        raise Rude(name)


class Impostor:
    """Says that it is a tensor."""

    __class__ = torch.Tensor


class Giving(nn.Linear):
    """Gives its tensor in a container."""

    def __init__(self, put):
        super().__init__(WIDTH, WIDTH)
        self.put = put

    def forward(self, x):
        return self.put(super().forward(x))


class Taking(nn.Linear):
    """Takes such a container, and gives a tensor."""

    def __init__(self, take):
        super().__init__(WIDTH, WIDTH)
        self.take = take

    def forward(self, held):
        return super().forward(self.take(held))


CONTAINERS = {
    "named": (lambda y: NeverIterated(y, y + 1), lambda held: held.left + held.right),
    "locked": (lambda y: Locked(value=y), lambda held: held["value"]),
    "keyed": (lambda y: {Key(): y * 2, "good": y}, lambda held: held["good"]),
    "shy": (lambda y: Shy(y, y + 1), lambda held: held.value),
    "closed": (lambda y: [Closed(), Impostor(), y], lambda held: held[2]),
}


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(WIDTH, WIDTH)
        self.lazy = nn.LazyLinear(WIDTH)
        self.proud = Proud(WIDTH, WIDTH)
        self.falsy = Falsy(WIDTH, WIDTH)
        self.disguised = Disguised(WIDTH, WIDTH)
        self.marked = marked(nn.Linear(WIDTH, WIDTH))
        self.touchy = WithParameter(Touchy(torch.randn(WIDTH, WIDTH), requires_grad=False), F.linear)
        self.secret = WithParameter(Secret(torch.randn(WIDTH, WIDTH), requires_grad=False), F.linear)
        self.wrapper = WithParameter(None, lambda x, w: F.linear(x, w.inner))
        self.wrapper._parameters["weight"] = Wrapper(torch.randn(WIDTH, WIDTH))
        self.meta = WithParameter(nn.Parameter(torch.empty(2, device="meta"), requires_grad=False), lambda x, w: 0)
        sparse = nn.Parameter(torch.eye(WIDTH).to_sparse(), requires_grad=False)
        self.sparse = WithParameter(sparse, lambda x, w: torch.sparse.mm(w, x.t()).t())
        self.complex = WithParameter(nn.Parameter(torch.randn(WIDTH, dtype=torch.complex64)), lambda x, w: (x * w).real)
        self.giving = nn.ModuleDict({name: Giving(put) for name, (put, _) in CONTAINERS.items()})
        self.taking = nn.ModuleDict({name: Taking(take) for name, (_, take) in CONTAINERS.items()})
        self.add_module("zero\0byte", nn.Linear(WIDTH, WIDTH))
        self.add_module("half\udc80", nn.Linear(WIDTH, WIDTH))
        self.quantized = quantized(nn.Sequential(nn.Linear(WIDTH, WIDTH)))
        self.last = nn.Linear(WIDTH, 1)

    def forward(self, x):
        x = self.lazy(self.first(x))
        for part in (self.proud, self.falsy, self.disguised, self.marked, self.touchy, self.secret, self.wrapper):
            x = torch.tanh(part(x))
        x = self.complex(self.sparse(self.meta(x)))
        for name in CONTAINERS:
            x = torch.tanh(self.taking[name](self.giving[name](x)))
        x = self._modules["half\udc80"](self._modules["zero\0byte"](x))
        return self.last(x + self.quantized(x.detach()))


PLAIN = [
    "first", "lazy", "proud", "falsy", "disguised", "marked", "touchy", "secret", "wrapper", "meta", "sparse",
    "complex", *(f"taking.{name}" for name in CONTAINERS), "last",
]  # fmt: skip


def quantized(module: nn.Module) -> nn.Module:
    """Its `weight` is a method."""
    from torch.ao.quantization import quantize_dynamic

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return quantize_dynamic(module, {nn.Linear}, dtype=torch.qint8)


def batch(step: int) -> torch.Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(step))


def build() -> Odd:
    model = Odd()
    with torch.no_grad():
        model(batch(99))  # a dry run, which gives the lazy layer its shape
    return model


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)


def train(model: nn.Module, watch=lambda step: None) -> None:
    """`watch` is told a step when its gradients are there."""
    optimizer = optimizer_of(model)
    Touchy.trains = True
    for step in range(STEPS):
        loss = model(batch(step)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        watch(step)
        optimizer.step()
        tiny.report(0, step, loss)


if __name__ == "__main__":
    if sys.argv[1:] == ["dynamo"]:
        import torch._dynamo
    train(build())
