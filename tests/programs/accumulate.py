"""Gradient accumulation with evaluation passes between: three microbatches a step, an evaluation after the second
microbatch and two after every step."""

import parallel
import tiny
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

STEPS, MICRO, SIZES = 2, 3, [2, 2]


def evaluate(model, index: int) -> None:
    model.eval()
    with torch.no_grad():
        model(tiny.batch(100 + index, SIZES, dist.get_rank())[0])
    model.train()


def main() -> None:
    rank = dist.get_rank()
    model = DistributedDataParallel(tiny.build())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(STEPS):
        for micro in range(MICRO):
            tokens, targets = tiny.batch(step * MICRO + micro, SIZES, rank)
            if micro == MICRO - 1:
                loss = tiny.loss_of(model(tokens), targets) / MICRO
                loss.backward()
            else:
                with model.no_sync():
                    loss = tiny.loss_of(model(tokens), targets) / MICRO
                    loss.backward()
            if micro == 1:
                evaluate(model, step * MICRO)
        optimizer.step()
        optimizer.zero_grad()
        evaluate(model, step * MICRO + 1)
        evaluate(model, step * MICRO + 2)
        parallel.report(step, loss, dist.get_world_size())


if __name__ == "__main__":
    parallel.launch(main)
