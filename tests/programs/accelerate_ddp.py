"""Hugging Face Accelerate on CPU (it prepares DistributedDataParallel)."""

import parallel
import tiny
import torch
import torch.distributed as dist
from accelerate import Accelerator


def main(steps: int = 3) -> None:
    accelerator = Accelerator(cpu=True)
    model = tiny.build()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for step in range(steps):
        tokens, targets = tiny.batch(step, [4, 4], dist.get_rank())
        loss = tiny.loss_of(model(tokens), targets)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        parallel.report(step, loss, dist.get_world_size())


if __name__ == "__main__":
    parallel.launch(main)
