"""Trains one small model after another in one process, each under a name of its own: `edited.py NAME...`."""

import sys

import tiny
import torch
from torch import nn

STEPS = 3


class Named(nn.Module):
    """A model that hooks reach by a name, and the others not."""

    def __init__(self, name: str):
        super().__init__()
        self.add_module(name, tiny.build())

    def forward(self, tokens):
        (model,) = self.children()
        return model(tokens)


def main(*names: str) -> None:
    for name in names:
        model = Named(name)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(STEPS):
            tokens, targets = tiny.batch(step, [4], 0)
            loss = tiny.loss_of(model(tokens), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            tiny.report(0, step, loss)


if __name__ == "__main__":
    main(*sys.argv[1:])
