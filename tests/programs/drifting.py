"""DDP whose ranks drift apart: before step 1, rank 1 changes a weight that all should have alike."""

import parallel
import tiny
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


def main() -> None:
    model = DistributedDataParallel(tiny.build())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    parallel.train(model, optimizer, steps=1)
    if dist.get_rank() == 1:
        with torch.no_grad():
            model.module.layers[0].mlp.up.weight[0, 0] += 1.0
    parallel.train(model, optimizer, steps=1)


if __name__ == "__main__":
    parallel.launch(main)
