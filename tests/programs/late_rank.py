"""Two processes that try their model out before either knows which rank it is: `late_rank.py MEET HOW [RANK]`, where
HOW is how they train it then: `wrapped`, or `bare` with a model that they register nowhere.
"""

import subprocess
import sys

import parallel
import tiny
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


def train(model, how: str) -> None:
    if how == "wrapped":
        model = DistributedDataParallel(model)
    parallel.train(model, torch.optim.SGD(model.parameters(), lr=0.1))


def main(meet: str, how: str, rank: int) -> None:
    model = tiny.build()
    with torch.no_grad():
        model(tiny.batch(0, [4, 4], rank)[0])
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=2)
    parallel.launch(train, model, how)


if __name__ == "__main__":
    if len(sys.argv) > 3:
        main(*sys.argv[1:3], int(sys.argv[3]))
    else:
        ranks = [subprocess.Popen([sys.executable, *sys.argv, str(rank)]) for rank in range(2)]
        sys.exit(max(rank.wait() for rank in ranks))
