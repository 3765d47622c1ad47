"""Trains under FSDP2 with deterministic algorithms: `gpu.py DTYPE STEPS cuda|cpu`, on a GPU a rank where there are any.

An in-place operation lies right behind a tapped module. At its end each rank prints the GPUs that its process has a
context on.
"""

import ctypes
import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

WIDTH, DEPTH, ROWS, LENGTH = 256, 4, 8, 128


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
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(WIDTH) for _ in range(DEPTH))
        self.head = nn.Linear(WIDTH, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def build(dtype: str, device: str) -> Net:
    torch.manual_seed(0)
    return Net().to(device, getattr(torch, dtype))


def batch(step: int, dtype: str, device: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(ROWS, LENGTH, WIDTH, generator=generator).to(device, getattr(torch, dtype))


def loss_of(out: torch.Tensor) -> torch.Tensor:
    return out.float().square().mean()


def contexts() -> list[int]:
    """GPUs on which this process has a primary context."""
    driver, found = ctypes.CDLL("libcuda.so.1"), []
    for number in range(torch.cuda.device_count()):
        flags, active = ctypes.c_uint(), ctypes.c_int()
        driver.cuDevicePrimaryCtxGetState(number, ctypes.byref(flags), ctypes.byref(active))
        if active.value:
            found.append(number)
    return found


def main(dtype: str, steps: int, device: str) -> None:
    torch.use_deterministic_algorithms(True)
    if device == "cuda":
        mine = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(mine)
        dist.init_process_group("nccl", device_id=mine)
    else:
        dist.init_process_group("gloo")
    model = build(dtype, device)
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(steps):
        loss = loss_of(model(batch(step, dtype, device)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step} loss {loss.item().hex()}", flush=True)
    if device == "cuda":
        torch.cuda.synchronize()
        print("contexts", contexts(), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
