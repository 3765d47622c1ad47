"""Calls parts of its model, never the model itself, as Lightning modules do; an activation is shared within a part.

Every first batch of a step runs out of memory halfway, and is tried again.
"""

import sys

import tiny
import torch
from torch import nn

STEPS, MICRO = 2, 2


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)
        self.act = nn.Tanh()
        self.memory = True

    def forward(self, x):
        x = self.act(self.first(x))
        if not self.memory:
            raise RuntimeError("out of memory")
        return x + self.act(self.second(x))


class Net(nn.Module):
    def __init__(self, width: int = 8):
        super().__init__()
        self.blocks = nn.Sequential(Block(width), Block(width))
        self.out = nn.Linear(width, 2)

    def forward(self, x):
        return self.out(self.blocks(x))


class Task(nn.Module):
    """Has no forward."""

    def __init__(self):
        super().__init__()
        self.net = Net()
        self.scale = nn.Linear(2, 2)

    def training_step(self, x):
        return self.scale(self.net(x)).square().mean()


def build() -> Task:
    torch.manual_seed(0)
    return Task()


def main(task: Task, before_pass=lambda step, micro: None) -> None:
    optimizer = torch.optim.SGD(task.parameters(), lr=0.1)
    data = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        passes = 0
        for micro in range(MICRO):
            x = torch.randn(3, 8, generator=data)
            for memory in (False, True) if micro == 0 else (True,):
                task.net.blocks[1].memory = memory
                before_pass(step, passes)
                passes += 1
                try:
                    loss = task.training_step(x)
                    loss.backward()
                except RuntimeError:
                    assert not memory
        optimizer.step()
        optimizer.zero_grad()
        tiny.report(0, step, loss)


if __name__ == "__main__":
    if "dynamo" in sys.argv:
        # Hooks that torch.compile can trace are not called after an error.
        import torch._dynamo
    main(build())
