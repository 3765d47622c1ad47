"""DistributedDataParallel."""

import sys

import parallel
import tiny
import torch
from torch.nn.parallel import DistributedDataParallel


def main(steps: int = 3) -> None:
    model = DistributedDataParallel(tiny.build())
    parallel.train(model, torch.optim.SGD(model.parameters(), lr=0.1), steps)


if __name__ == "__main__":
    parallel.launch(main, *map(int, sys.argv[1:]))
