"""Modules that take and return more than one tensor, in every container scripts use."""

from collections import namedtuple
from dataclasses import dataclass

import tiny
import torch
from torch import nn
from transformers.utils import ModelOutput

Pair = namedtuple("Pair", ["left", "right"])


@dataclass
class State:
    hidden: torch.Tensor
    gate: torch.Tensor
    name: str = "state"


@dataclass
class Output(ModelOutput):
    logits: torch.Tensor | None = None
    loss: torch.Tensor | None = None
    hidden: tuple | None = None


class Tuple(nn.Linear):
    def forward(self, x):
        y = super().forward(x)
        return y, None, y * 2


class Dict(nn.Linear):
    def forward(self, pair):
        y = super().forward(pair[0] + pair[1])
        return {"value": y, "more": [y + 1, {"deep": y + 2}], "count": 3}


class Data(nn.Linear):
    def forward(self, *, states, scale=1.0):
        y = super().forward(states["value"]) * scale
        return State(hidden=y, gate=torch.sigmoid(y))


class Named(nn.Linear):
    def forward(self, state: State):
        return Pair(super().forward(state.hidden), state.gate)


class Head(nn.Linear):
    def forward(self, pair, targets=None):
        logits = super().forward(pair.left * pair.right)
        loss = nn.functional.cross_entropy(logits, targets)
        return Output(logits=logits, loss=loss, hidden=(pair.left + 0, pair.right + 0))


class Structured(nn.Module):
    def __init__(self, width: int = 8):
        super().__init__()
        self.tuple = Tuple(width, width)
        self.dict = Dict(width, width)
        self.data = Data(width, width)
        self.named = Named(width, width)
        self.head = Head(width, width)

    def forward(self, x, targets):
        first, _, second = self.tuple(x)
        states = self.dict((first, second))
        state = self.data(states=states, scale=0.5)
        return self.head(self.named(state), targets=targets)


def build() -> Structured:
    torch.manual_seed(0)
    return Structured()


def batch(step: int):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(6, 8, generator=generator), torch.randint(0, 8, (6,), generator=generator)


def main(steps: int = 2) -> None:
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(steps):
        output = model(*batch(step))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        tiny.report(0, step, output["loss"])


if __name__ == "__main__":
    main()
