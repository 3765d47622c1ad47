"""Activation checkpointing of every block, and one module that is called twice: `checkpointing.py MODE...`,
one after another; a mode is `reentrant` or `plain`.
"""

import sys

import parallel
import tiny
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

STEPS = 2


class Checkpointed(tiny.Net):
    def __init__(self, reentrant: bool, **sizes):
        super().__init__(**sizes)
        self.reentrant = reentrant
        self.twice = nn.Linear(tiny.WIDTH, tiny.WIDTH)

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=self.reentrant)
            x = checkpoint(self.again, x, use_reentrant=self.reentrant)
        return self.lm_head(self.norm(x))

    def again(self, x):
        return x + torch.tanh(self.twice(x))


def build(reentrant: bool) -> Checkpointed:
    torch.manual_seed(0)
    return Checkpointed(reentrant)


def main(*modes: str) -> None:
    for mode in modes:
        # Reentrant replays and DDP's reducer agree on a static graph only.
        model = DistributedDataParallel(build(mode == "reentrant"), static_graph=True)
        parallel.train(model, torch.optim.SGD(model.parameters(), lr=0.1), steps=STEPS)


if __name__ == "__main__":
    parallel.launch(main, *sys.argv[1:])
