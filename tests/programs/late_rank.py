"""Two processes that try their model out before either knows which rank it is: `late_rank.py MEET [RANK]`."""

import subprocess
import sys

import parallel
import tiny
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


def train(model) -> None:
    model = DistributedDataParallel(model)
    parallel.train(model, torch.optim.SGD(model.parameters(), lr=0.1))


def main(meet: str, rank: int) -> None:
    model = tiny.build()
    with torch.no_grad():
        model(tiny.batch(0, [4, 4], rank)[0])
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=2)
    parallel.launch(train, model)


if __name__ == "__main__":
    if len(sys.argv) > 2:
        main(sys.argv[1], int(sys.argv[2]))
    else:
        ranks = [subprocess.Popen([sys.executable, __file__, sys.argv[1], str(rank)]) for rank in range(2)]
        sys.exit(max(rank.wait() for rank in ranks))
