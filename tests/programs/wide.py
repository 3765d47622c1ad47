"""Few layers with large outputs: `wide.py STEPS [ROWS]`; every module's output has ROWS times 4 KiB."""

import sys

import parallel
import tiny
import torch
import torch.distributed as dist
from torch import nn

WIDTH = 1024


def build() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU())


def batch(step: int, rows: int, rank: int):
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(10 * step + rank))


def main(steps: int, rows: int = 1024) -> None:
    rank = dist.get_rank()
    model = nn.parallel.DistributedDataParallel(build())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(steps):
        loss = model(batch(step, rows, rank)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        tiny.report(rank, step, loss)


if __name__ == "__main__":
    parallel.launch(main, *map(int, sys.argv[1:]))
