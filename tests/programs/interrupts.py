"""Signals that come while somebody looks at an attribute which the job itself never reads.

What their handlers raise is the job's. Prints whether it came, and goes on training.
"""

import functools
import os
import signal
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


class Late(Exception):
    """The job's deadline has passed."""


class Over(BaseException):
    """The same, for those who catch every Exception."""


def late(number, frame):
    raise Late


class Deadline:
    """A handler that is no function."""

    def __call__(self, number, frame):
        raise Over


SIGNALS = {signal.SIGUSR1: Late, signal.SIGUSR2: Over, signal.SIGINT: KeyboardInterrupt}


def come() -> None:
    """Sends the signal that is due, once."""
    global DUE
    if DUE is not None:
        number, DUE = DUE, None
        os.kill(os.getpid(), number)
        for _ in range(1000):  # until the handler runs
            pass


class Ordered(nn.Linear):
    @property
    def batch_first(self):
        come()
        return False


class Known(nn.Parameter):
    @property
    def tensor_model_parallel(self):
        come()
        raise AttributeError("tensor_model_parallel")


class Parametrized(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = Known(torch.ones(3))

    def forward(self, x):
        return x * self.weight


@dataclass
class Output:
    value: Any
    other: Any = None

    def __getattribute__(self, name):
        if name == "other":
            come()
        return super().__getattribute__(name)


class Giving(nn.Linear):
    def forward(self, x):
        return Output(super().forward(x))


class Key:
    def __str__(self):
        come()
        return "key"


class Keyed(nn.Linear):
    def forward(self, x):
        return {Key(): super().forward(x)}


def value_of(output):
    if isinstance(output, Output):
        return output.value
    return next(iter(output.values())) if isinstance(output, dict) else output


CASES = {
    "order": lambda: Ordered(3, 3),
    "parameter": Parametrized,
    "field": lambda: Giving(3, 3),
    "key": lambda: Keyed(3, 3),
}
STEPS = 2


def main() -> None:
    global DUE
    signal.signal(signal.SIGUSR1, functools.partial(late))
    signal.signal(signal.SIGUSR2, Deadline())
    for name, build in CASES.items():
        for number, raised in SIGNALS.items():
            model = nn.Sequential(build())
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            DUE, came = number, "nothing"
            for _ in range(STEPS + 1):
                try:
                    loss = value_of(model(torch.ones(2, 3))).sum()
                except raised as e:
                    came = type(e).__name__
                    continue
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            print("case", name, raised.__name__, came)


DUE = None

if __name__ == "__main__":
    main()
