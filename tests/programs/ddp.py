"""DistributedDataParallel; `rows` of every batch for each rank."""

import sys

import parallel
import tiny
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


def main(steps: int = 3, rows: int = 4) -> None:
    model = DistributedDataParallel(tiny.build())
    parallel.train(model, torch.optim.SGD(model.parameters(), lr=0.1), steps, (rows,) * dist.get_world_size())


if __name__ == "__main__":
    parallel.launch(main, *map(int, sys.argv[1:]))
