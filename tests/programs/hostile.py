"""Inputs easily broken: linked and huge structures, tensors of a class or with attributes; raising forwards."""

import contextlib
import gc
import weakref
from dataclasses import dataclass
from typing import Any

import tiny
import torch
from torch import nn

WIDTH = 8


class Named(torch.Tensor):
    """A tensor with a method of its own."""

    def greet(self) -> str:
        return "hello"


@dataclass
class Node:
    """Refers to itself twice: walking along every way takes for ever."""

    value: Any = None
    left: Any = None
    right: Any = None


class Linked(nn.Linear):
    def forward(self, x, node, words):
        assert node.left is node and len(words) == 200_000
        return super().forward(x + node.value)


class Greeted(nn.Linear):
    def forward(self, x):
        assert x.greet() == "hello" and x.tag == [1, 2] and x.tag is TAG
        return super().forward(x.as_subclass(torch.Tensor))


class Weighed(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x, weight):
        assert isinstance(weight, nn.Parameter)
        return x * weight


class Sparse(nn.Module):
    def forward(self, x):
        return x.to_sparse()


class Raising(nn.Linear):
    def forward(self, *, states):
        raise StopIteration


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linked = Linked(WIDTH, WIDTH)
        self.greeted = Greeted(WIDTH, WIDTH)
        self.weighed = Weighed()
        self.sparse = Sparse()
        self.raising = Raising(WIDTH, WIDTH)

    def forward(self, x):
        node = Node(value=x * 2)
        node.left = node.right = node
        y = self.linked(x, node, WORDS)
        y = y.as_subclass(Named)
        y.tag = TAG
        y = self.weighed(self.greeted(y), self.weighed.weight)
        return self.sparse(y).to_dense()

    def probe(self, x):
        return self.raising(states=[self.linked.weight @ x])


WORDS = ["word"] * 200_000
TAG = [1, 2]


def main() -> None:
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(2):
        loss = model(torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(step))).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        tiny.report(0, step, loss)
    alive = []
    for _ in range(20):
        x = torch.ones(WIDTH)
        alive.append(weakref.ref(x))
        with contextlib.suppress(StopIteration):
            model.probe(x)
    del x
    gc.collect()
    # A tap may hold what the last forward was given.
    print("inputs alive:", sum(ref() is not None for ref in alive[:-1]))


if __name__ == "__main__":
    main()
