"""A job that loses a rank twice and is started again: its rows say of which attempt, rank and step they are."""

import os
import time

import torch
import torch.distributed as dist
from torch import nn

STEPS = (4, 4, 1)
"""Of each attempt. Attempt 0 loses rank 1 before its last step, and attempt 1 rank 0."""


def value(attempt: int, rank: int, step: int) -> float:
    """What a rank's rows have in a step."""
    return 100.0 * attempt + 10 * rank + step


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.probe = nn.Identity()
        self.linear = nn.Linear(4, 1)

    def forward(self, x):
        return self.linear(self.probe(x) + 0)


def main() -> None:
    torch.set_num_threads(1)
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model = nn.parallel.DistributedDataParallel(Model())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(STEPS[attempt]):
        if step == STEPS[0] - 1 and rank == 1 - attempt:
            time.sleep(0.5)  # the other one is in this step by then, and has captured it
            os._exit(17)
        model(torch.full((2, 4), value(attempt, rank, step))).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
