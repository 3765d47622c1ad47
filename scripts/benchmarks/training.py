"""An ordinary training loop, FSDP2 under torchrun and plain alone, that runs as many steps as it is told at a time.

    python training.py ADDRESS          or          torchrun --standalone --nproc-per-node 2 training.py ADDRESS
"""

import sys
import time
from multiprocessing.connection import Client

import torch
import torch.distributed as dist
from torch import nn

WIDTH, LAYERS, ROWS = 256, 12, 32


class Block(nn.Module):
    """Many small modules: what a preload would cost, it would cost here."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Identity(), nn.Linear(WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(self.norm(x))


def main() -> None:
    sharded = dist.is_torchelastic_launched()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(*[Block() for _ in range(LAYERS)])
    rank = 0
    if sharded:
        from torch.distributed.fsdp import fully_shard

        dist.init_process_group("gloo")
        rank = dist.get_rank()
        for block in model:
            fully_shard(block)
        fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    x = torch.randn(ROWS, WIDTH)

    def step() -> None:
        loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    for _ in range(5):
        step()
    connection = Client(sys.argv[1]) if rank == 0 else None
    while True:
        todo = [connection.recv() if connection else None]
        if sharded:
            dist.broadcast_object_list(todo)
        if todo[0] is None:
            break
        times, cpu = [], time.process_time()
        for _ in range(todo[0]):
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
        if connection:
            connection.send((times, time.process_time() - cpu))
    if sharded:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
