"""Modules whose inputs have other uses, are leaves, are changed in place, returned as they are, or kept.

`uses.py exact` computes with small whole numbers, whose sums are the same in any order; `uses.py random` does not.
"""

import sys

import tiny
import torch
from torch import nn

WIDTH = 8


def weight(exact: bool) -> nn.Parameter:
    values = torch.randint(-2, 3, (WIDTH, WIDTH)).double() if exact else torch.randn(WIDTH, WIDTH, dtype=torch.double)
    return nn.Parameter(values)


class Thrice(nn.Module):
    """Uses what it is given three times, as attention does for query, key and value."""

    def __init__(self, exact):
        super().__init__()
        self.q, self.k, self.v = (weight(exact) for _ in range(3))

    def forward(self, x):
        return x @ self.q + (x @ self.k) * 2 + x @ self.v


class Square(nn.Module):
    """One operation with its input twice."""

    def forward(self, x):
        return x * x


class Halves(nn.Module):
    """Two results; the model drops the second."""

    def __init__(self, exact):
        super().__init__()
        self.one, self.two = weight(exact), weight(exact)

    def forward(self, x):
        return x @ self.one, x @ self.two


class Keeps(nn.Module):
    """What it keeps of its input goes into the loss, and is not in what it returns."""

    def forward(self, x):
        self.kept = (x * 3).sum()
        return x * 2


class Widen(torch.autograd.Function):
    """Its gradient has more columns than its input: autograd adds them up."""

    @staticmethod
    def forward(ctx, x):
        return x.expand(-1, WIDTH).clone()

    @staticmethod
    def backward(ctx, grad):
        return grad


class Wide(nn.Module):
    def forward(self, x):
        return Widen.apply(x)


class Dirty(torch.autograd.Function):
    """Changes its input in place and has two results: autograd forbids that for views."""

    @staticmethod
    def forward(ctx, x):
        x.mul_(2)
        ctx.mark_dirty(x)
        return x, x.sum(0)

    @staticmethod
    def backward(ctx, grad, of_sum):
        return (grad + of_sum) * 2


class Changes(nn.Module):
    def forward(self, x):
        y, total = Dirty.apply(x)
        return y + total


class Adds(nn.Module):
    """Returns what it was given, with more in it."""

    def forward(self, data):
        data["sum"] = data["x"] + data["leaf"]
        return data


class Holds(nn.Module):
    """Returns its parameter."""

    def __init__(self, exact):
        super().__init__()
        self.weight = weight(exact)

    def forward(self):
        return self.weight


class Leaf(nn.Module):
    def forward(self, x):
        assert x.is_leaf and x is LEAF
        self.given = x
        return x * 2


class Uses(nn.Module):
    def __init__(self, exact: bool):
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH, bias=False, dtype=torch.double)
        self.first.weight = weight(exact)
        self.layers = nn.ModuleList(Thrice(exact) for _ in range(3))
        self.square = Square()
        self.halves = Halves(exact)
        self.same = nn.Identity()
        self.once = nn.Identity()
        self.rows = nn.Linear(WIDTH, WIDTH, dtype=torch.double)
        self.rows.weight, self.rows.bias = weight(exact), nn.Parameter(torch.zeros(WIDTH, dtype=torch.double))
        self.adds = Adds()
        self.holds = Holds(exact)
        self.keeps = Keeps()
        self.wide = Wide()
        self.changes = Changes()
        self.act = nn.ReLU(inplace=True)
        self.view = nn.ReLU(inplace=True)
        self.leaf = Leaf()

    def forward(self, x, leaf):
        memory = self.first(x)
        y = memory * 1
        for layer in self.layers:
            y = y + layer(memory)  # as a decoder's layers read the encoder's output
        z = self.same(memory)
        y = y + memory * z + z + self.square(memory) + self.once(memory * 3)
        rows = self.rows(memory[None])  # a view, changed in place after it was returned
        rows *= 5
        data = {"x": memory, "leaf": leaf}
        assert self.adds(data) is data and data["x"] is memory and data["leaf"] is leaf
        assert self.holds() is self.holds.weight
        y = y + rows[0] + data["sum"] + self.holds()[:4]
        y = y + self.halves(memory)[0] + self.keeps(memory) + self.wide(memory[:, :1])
        y = y + self.changes(memory + 0) + self.act(memory + 1)
        changed = memory + 2
        self.view(changed[0])
        return y + changed + self.leaf(leaf)


LEAF = torch.arange(WIDTH, dtype=torch.double).requires_grad_()


def build(exact: bool) -> Uses:
    torch.manual_seed(0)
    return Uses(exact)


def batch(step: int, exact: bool) -> torch.Tensor:
    generator, shape = torch.Generator().manual_seed(step), (4, WIDTH)
    values = torch.randint(-2, 3, shape, generator=generator) if exact else torch.randn(shape, generator=generator)
    return values.double()


def loss_of(model: Uses, x: torch.Tensor) -> torch.Tensor:
    return model(x, LEAF).sum() + model.keeps.kept


def main(how: str) -> None:
    exact = how == "exact"
    model = build(exact)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0 if exact else 1e-3)
    for step in range(2):
        loss = loss_of(model, batch(step, exact))
        optimizer.zero_grad()
        loss.backward()
        print([p.grad.sum().item().hex() for p in model.parameters() if p.grad is not None])
        assert model.leaf.given is LEAF and LEAF.grad is not None
        optimizer.step()
        tiny.report(0, step, loss)


if __name__ == "__main__":
    main(sys.argv[1])
