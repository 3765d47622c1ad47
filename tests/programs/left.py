"""What backward passes leave: microbatches that are reduced only with the last, and gradients that are clipped then.

`left.py CASE...`, one after another on two ranks: ddp, fsdp1, fsdp2.
"""

import contextlib
import sys

import parallel
import tiny
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

STEPS, MICRO, SIZES = 2, 3, (2, 2)
# Of the norm of all gradients: all are clipped.
LARGEST = 1e-2


def build() -> nn.Module:
    return tiny.build(layers=1)


def fsdp2(model: nn.Module) -> nn.Module:
    for layer in model.layers:
        fully_shard(layer)
    return fully_shard(model)


CASES = {
    "ddp": DistributedDataParallel,
    "fsdp1": lambda model: FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True),
    "fsdp2": fsdp2,
}


@contextlib.contextmanager
def unreduced(model: nn.Module, case: str):
    """Microbatches that are not reduced."""
    if case != "fsdp2":
        with model.no_sync():
            yield
    else:
        model.set_requires_gradient_sync(False)
        yield
        model.set_requires_gradient_sync(True)


def clip(model: nn.Module, case: str) -> None:
    if case == "fsdp1":
        model.clip_grad_norm_(LARGEST)
    else:
        nn.utils.clip_grad_norm_(model.parameters(), LARGEST)


def loss_of(model: nn.Module, step: int, micro: int, rank: int) -> torch.Tensor:
    tokens, targets = tiny.batch(step * MICRO + micro, list(SIZES), rank)
    return tiny.loss_of(model(tokens), targets) / MICRO


def train(case: str) -> None:
    rank = dist.get_rank()
    model = CASES[case](build())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(STEPS):
        for micro in range(MICRO):
            with unreduced(model, case) if micro < MICRO - 1 else contextlib.nullcontext():
                loss = loss_of(model, step, micro, rank)
                loss.backward()
        clip(model, case)
        optimizer.step()
        optimizer.zero_grad()
        parallel.report(step, loss, dist.get_world_size())


def main(*cases: str) -> None:
    for case in cases:
        train(case)


if __name__ == "__main__":
    parallel.launch(main, *sys.argv[1:])
