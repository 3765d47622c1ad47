"""Two worker processes that train twice, as those of pools and clusters do: `reused.py FOLDER`. In the second training
each is the other rank, and the model is sharded over an equal mesh."""

import sys

import parallel
import tiny
import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.distributed.fsdp import fully_shard

TURNS = 2
kept = []
"""Models, with their meshes, as whoever caches them has."""


def train() -> None:
    model = tiny.build()
    kept.append(model)
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)
    parallel.train(model, torch.optim.SGD(model.parameters(), lr=0.1))


def work(number: int, folder: str) -> None:
    for turn in range(TURNS):
        rank = number if turn == 0 else 1 - number
        dist.init_process_group("gloo", init_method=f"file://{folder}/{turn}", rank=rank, world_size=2)
        parallel.launch(train)


if __name__ == "__main__":
    multiprocessing.spawn(work, args=(sys.argv[1],), nprocs=2)
