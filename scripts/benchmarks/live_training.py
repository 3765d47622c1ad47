"""An ordinary data-parallel script that trains until a file appears: `live_training.py STOP`.

Rank 0 prints a line a step: its number, when it ended in seconds since the epoch, and how long it took.
"""

import pathlib
import sys
import time

import torch
import torch.distributed as dist
from torch import nn

WIDTH, LAYERS, ROWS = 256, 4, 64


def main(stop: str) -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)]))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    x, over = torch.randn(ROWS, WIDTH), torch.zeros(1)
    for step in range(1 << 30):
        start = time.perf_counter()
        loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if dist.get_rank() == 0:
            print(step, time.time(), time.perf_counter() - start, flush=True)
        over.fill_(float(pathlib.Path(stop).exists()))
        dist.all_reduce(over)
        if over.item() > 0:
            break
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
