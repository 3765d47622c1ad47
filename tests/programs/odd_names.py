"""Modules whose names have what separates the parts of a clause, spaces, ends of lines, and very many characters."""

import tiny
import torch
from torch import nn

WIDTH = 4
STEPS = 2
NAMES = ["a;b", "a:b", "a@b", "a|b", "a,b", "a=b", "a/b", "a b", "a\nb", "a\tb", "(a)", "a*b", "[0]", "ä", "x" * 4096]
"""torch refuses a dot, and nothing else."""


def build() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential()
    for name in NAMES:
        model.add_module(name, nn.Linear(WIDTH, WIDTH))
    return model


def batch(step: int) -> torch.Tensor:
    return torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(step))


def main() -> None:
    torch.set_num_threads(1)
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(STEPS):
        loss = model(batch(step)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        tiny.report(0, step, loss)


if __name__ == "__main__":
    main()
