"""A job whose ranks do not all do the same: `diverging.py WHAT`, which rank 1 does otherwise.

It `skip`s a module at step 1; it `raise`s at step 2, or ends by `kill -9`, or `stop`s (SIGSTOP), once the file that GO
names is there; it has `other` hooks than rank 0, or `none`.
"""

import os
import signal
import sys
import time

WHAT = sys.argv[1]
ODD = os.environ["RANK"] == "1"
if ODD and WHAT == "other":
    os.environ["FLEXMODEL_HOOKS"] = "up@assemble=collective"
if ODD and WHAT == "none":
    os.environ["FLEXMODEL_HOOKS"] = "up;extra;down"

import parallel
import torch
import torch.distributed as dist
from torch import nn

ROWS, WIDTH, STEPS = 2, 8, 4


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH)
        self.extra = nn.Linear(WIDTH, WIDTH)
        self.down = nn.Linear(WIDTH, 1)

    def forward(self, x, skip: bool):
        x = self.up(x)
        return self.down(x if skip else self.extra(x))


def give_up() -> None:
    while not os.path.exists(os.environ["GO"]):
        time.sleep(0.01)
    if WHAT == "raise":
        raise ValueError("rank 1 gives up")
    os.kill(os.getpid(), signal.SIGSTOP if WHAT == "stop" else signal.SIGKILL)


def main() -> None:
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(Net(), find_unused_parameters=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(7 + dist.get_rank())
    for step in range(STEPS):
        if ODD and step == 2 and "GO" in os.environ:
            give_up()
        skip = ODD and WHAT == "skip" and step == 1
        loss = model(torch.randn(ROWS, WIDTH, generator=generator), skip).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        parallel.report(step, loss, dist.get_world_size())


if __name__ == "__main__":
    parallel.launch(main)
