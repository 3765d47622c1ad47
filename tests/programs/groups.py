"""A job that destroys its process group and makes another. Rank 0 prints whether anything still holds the old one."""

import gc
import os
import weakref

import parallel
import torch
import torch.distributed as dist
from torch import nn

STEPS, ROWS, WIDTH = 2, 2, 8


def train(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(10 * number + rank)
    for step in range(STEPS):
        loss = model(torch.randn(ROWS, WIDTH, generator=generator)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
        optimizer.step()
        parallel.report(number * STEPS + step, loss, world)


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    # torchrun's own, if it has one there.
    is_mine = rank == 0 and "TORCHELASTIC_USE_AGENT_STORE" not in os.environ
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=is_mine)
    for number in range(2):
        dist.init_process_group("gloo", store=dist.PrefixStore(str(number), store), rank=rank, world_size=world)
        train(model, optimizer, number)
        group = weakref.ref(dist.group.WORLD)
        dist.barrier()
        dist.destroy_process_group()
        gc.collect()
        if rank == 0:
            print(f"group {number} is {'held' if group() is not None else 'gone'}")


if __name__ == "__main__":
    main()
