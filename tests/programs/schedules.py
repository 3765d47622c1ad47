"""Ranks that do not all do the same: random schedules of passes, of which some are made by all ranks and some by one.

`schedules.py SEED...`: one DDP model for each seed. What a pass is given says which pass it is, and on which rank.
"""

import contextlib
import random
import sys

import torch
import torch.distributed as dist
from torch import nn

STEPS = 3
ROWS = 2
WORLD = 2


def schedule(seed):
    """Events in the order in which they happen: (name, pass, ranks that make it)."""
    choice, events = random.Random(seed), []
    everyone = list(range(WORLD))

    def some(names, most):
        for _ in range(choice.randint(0, most)):
            name = choice.choice(names)
            by = [choice.choice(everyone)] if name in ("sample", "attack") else everyone
            events.append((name, len(events), by))

    for _ in range(STEPS):
        some(["sample", "attack", "evaluate", "barrier"], 3)
        for _ in range(choice.randint(0, 2)):
            events.append(("accumulate", len(events), everyone))
            some(["sample", "attack", "barrier"], 1)
        events.append(("train", len(events), everyone))
        some(["sample", "barrier"], 2)
        if choice.random() < 0.8:
            events.append(("step", len(events), everyone))
    return events


def given(number, rank):
    """What a rank gives the model in a pass."""
    x = torch.randn(ROWS, 8, generator=torch.Generator().manual_seed(100 * number + rank))
    x[:, 0], x[:, 1] = number, rank
    return x


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 1))


def run(seed, rank):
    """Rank 1 builds a model that nobody else has first, and keeps it."""
    own = build() if rank == 1 and seed % 2 else None
    if own is not None:
        own(given(0, rank))
    model = nn.parallel.DistributedDataParallel(build())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for name, number, by in schedule(seed):
        if rank not in by:
            continue
        x = given(number, rank)
        if name == "barrier":
            dist.barrier()
        elif name == "step":
            optimizer.step()
            optimizer.zero_grad()
        elif name in ("sample", "evaluate"):
            with torch.no_grad():
                (model.module if name == "sample" else model)(x)
        elif name == "attack":
            x.requires_grad_()
            torch.autograd.grad(model.module(x).sum(), x)
        else:
            with model.no_sync() if name == "accumulate" else contextlib.nullcontext():
                loss = model(x).pow(2).mean()
                loss.backward()
            losses.append(loss.detach())
    return losses, own


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    losses, kept = [], []
    for seed in map(int, sys.argv[1:]):
        some, own = run(seed, dist.get_rank())
        losses += some
        kept.append(own)
    if dist.get_rank() == 0:
        print("LOSSES", *(float(loss).hex() for loss in losses))
    dist.destroy_process_group()
