"""Trains on a GPU a rank under FSDP2, with an in-place operation right behind a tapped module."""

import os
import sys
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.turn = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.mlp(x)
        out.mul_(0.5)  # after the tap took its snapshot
        return x + self.turn(out.transpose(0, 1)).transpose(0, 1)


class Net(nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def build(dtype: torch.dtype, width: int, depth: int) -> Net:
    torch.manual_seed(0)
    return Net(width, depth).to("cuda", dtype)


def batch(step: int, rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(rows, 128, width, generator=generator).to("cuda", dtype)


def main(dtype: str = "float32", width: int = 256, depth: int = 4, rows: int = 8, steps: int = 4) -> None:
    torch.use_deterministic_algorithms(True)
    kind = getattr(torch, dtype)
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    model = build(kind, width, depth)
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(steps):
        x = batch(step, rows, width, kind)
        torch.cuda.synchronize()
        start = time.perf_counter()
        loss = model(x).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        print(f"time {step} {time.perf_counter() - start:.6f}", file=sys.stderr, flush=True)
        print(f"step {step} loss {loss.item().hex()}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:2], *map(int, sys.argv[2:]))
