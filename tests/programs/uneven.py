"""DistributedDataParallel with another number of rows on every rank."""

import parallel
import tiny
import torch
from torch.nn.parallel import DistributedDataParallel

SIZES = (3, 5)


def main() -> None:
    model = DistributedDataParallel(tiny.build())
    parallel.train(model, torch.optim.SGD(model.parameters(), lr=0.1), steps=2, sizes=SIZES)


if __name__ == "__main__":
    parallel.launch(main)
