"""Optimizers whose steps take what is no closure, or call a closure in ways of their own.

Each trains a small model and prints what its step was given, returned and raised, and the gradients that it used.
"""

import functools
import inspect
import sys

import torch
from torch import nn

STEPS = 2


class Base(torch.optim.Optimizer):
    """Plain descent, and a word about what a step was given."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})

    def descend(self, factor=1.0):
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    print("grad", LABEL, p.grad.double().sum().item().hex())
                    p.sub_(p.grad, alpha=group["lr"] * factor)


class TakesLoss(Base):
    def step(self, loss):
        print(type(loss).__name__, loss is GIVEN)
        self.descend(min(1.0, float(loss)))


class TakesModel(Base):
    def step(self, model):
        print(model is GIVEN, model.training)
        self.descend()


class TakesSchedule(Base):
    def step(self, schedule):
        print(schedule is GIVEN, inspect.isfunction(schedule))
        self.descend(schedule(2))


class TakesKeyword(Base):
    def step(self, *, metrics=None):
        print(metrics is GIVEN)
        self.descend()


class CallsWithArguments(Base):
    def step(self, closure=None):
        print(inspect.signature(closure), closure.__name__)
        with torch.enable_grad():
            loss = closure(0.5, shift=1.0)
        self.descend()
        return loss


class TakesItSecond(Base):
    def step(self, scale, closure=None):
        with torch.enable_grad():
            loss = closure()
        self.descend(scale)
        return loss


class HandsOn(Base):
    """Gives whatever it is given to another optimizer, as wrappers do."""

    def __init__(self, params):
        super().__init__(params)
        self.inner = torch.optim.SGD(self.param_groups[0]["params"], lr=0.1)

    def step(self, *args, **kwargs):
        loss = self.inner.step(*args, **kwargs)
        for p in self.param_groups[0]["params"]:
            print("grad", LABEL, p.grad.double().sum().item().hex())
        return loss


class CallsTwice(Base):
    def step(self, closure):
        with torch.enable_grad():
            first = closure()
            print("grad", LABEL, *(p.grad.double().sum().item().hex() for p in self.param_groups[0]["params"]))
            second = closure()
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                p.sub_(p.grad, alpha=0.1)
        return first + second


class Inherits(CallsWithArguments):
    def step(self, closure=None):
        return super().step(closure)


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(4, 1, bias=False)


def loss_of(model, step, factor=1.0, shift=0.0):
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(step))
    return (model(x) * factor + shift).square().mean()


class Callable:
    """A closure that is no function."""

    def __init__(self, closure):
        self.closure = closure

    def __call__(self):
        return self.closure()


class Refused(Exception):
    """What the job's own closure raises."""


def plainly(call):
    """With gradients that are there before the step."""

    def train(model, optimizer, step):
        global GIVEN
        loss = loss_of(model, step)
        optimizer.zero_grad()
        loss.backward()
        GIVEN = {"loss": loss.detach(), "model": model, "schedule": lambda n: 1.0 / n, "nothing": None}[call]
        return optimizer.step(GIVEN)

    return train


def by_keyword(model, optimizer, step):
    global GIVEN
    loss = loss_of(model, step)
    optimizer.zero_grad()
    loss.backward()
    GIVEN = [lambda: None]
    return optimizer.step(metrics=GIVEN)


def by_closure(give):
    """With a closure, given as `give(step, closure)` does."""

    def train(model, optimizer, step):
        def closure(factor=1.0, shift=0.0):
            loss = loss_of(model, step, factor, shift)
            optimizer.zero_grad()
            loss.backward()
            return loss

        return give(optimizer.step, closure)

    return train


def raising(model, optimizer, step):
    def closure(*args, **kwargs):
        raise Refused(args, kwargs)

    try:
        optimizer.step(closure)
    except Refused as e:
        print("refused", e, e.__traceback__.tb_next is not None)
    return plainly("loss")(model, torch.optim.SGD(model.parameters(), lr=0.1), step) if step > STEPS else None


CASES = {
    "loss": (TakesLoss, plainly("loss")),
    "model": (TakesModel, plainly("model")),
    "schedule": (TakesSchedule, plainly("schedule")),
    "keyword": (TakesKeyword, by_keyword),
    "arguments": (CallsWithArguments, by_closure(lambda step, closure: step(closure))),
    "named": (CallsWithArguments, by_closure(lambda step, closure: step(closure=closure))),
    "second": (TakesItSecond, by_closure(lambda step, closure: step(0.5, closure))),
    "handed_on": (HandsOn, by_closure(lambda step, closure: step(closure))),
    "handed_on_by_name": (HandsOn, by_closure(lambda step, closure: step(closure=closure))),
    "handed_on_none": (HandsOn, plainly("nothing")),
    "twice": (CallsTwice, by_closure(lambda step, closure: step(closure))),
    "inherited": (Inherits, by_closure(lambda step, closure: step(closure))),
    "partial": (HandsOn, by_closure(lambda step, closure: step(functools.partial(closure, 1.0)))),
    "object": (HandsOn, by_closure(lambda step, closure: step(Callable(closure)))),
    "raising": (CallsWithArguments, raising),
}
# Those whose steps use gradients.
USING = [name for name in CASES if name != "raising"]


def main() -> None:
    global LABEL
    for LABEL, (optimizer_class, train) in CASES.items():
        model = build()
        optimizer = optimizer_class(model.parameters())
        for step in range(STEPS):
            result = train(model, optimizer, step)
            print(LABEL, step, "gave", None if result is None else float(result.detach()).hex())
        print(LABEL, "is", *(v.item().hex() for v in model.weight.flatten()))
    sys.stdout.flush()


LABEL, GIVEN = "", None

if __name__ == "__main__":
    main()
