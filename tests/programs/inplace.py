"""In-place operations inside modules, on their inputs and on their outputs."""

import tiny
import torch
from torch import nn


class Inplace(nn.Module):
    def __init__(self, width: int = 16):
        super().__init__()
        self.first = nn.Linear(width, width)
        self.act = nn.ReLU(inplace=True)
        self.second = nn.Linear(width, width)
        self.third = nn.Linear(width, width)
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        y = self.act(self.first(x))
        z = self.second(y)
        z.mul_(2)  # the output of `second`, changed after it returned
        w = self.third(z)
        w += x
        return self.head(w)


def build() -> Inplace:
    torch.manual_seed(0)
    return Inplace()


def batch(step: int):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(6, 16, generator=generator), torch.randint(0, 4, (6,), generator=generator)


def main(steps: int = 2) -> None:
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(steps):
        x, targets = batch(step)
        loss = nn.functional.cross_entropy(model(x), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        tiny.report(0, step, loss)


if __name__ == "__main__":
    main()
