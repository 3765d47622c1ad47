"""DistributedDataParallel fed by DataLoader workers, which every rank starts in two ways; a worker runs a module of its
own."""

import loader
import parallel
import tiny
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

METHODS = (("fork", "spawn"), ("fork", "forkserver"))


def main() -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    model = DistributedDataParallel(tiny.build())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = 0
    for method in METHODS[rank]:
        rows = DataLoader(loader.Rows(), batch_size=8, num_workers=1, multiprocessing_context=method)
        for tokens, targets in rows:
            loss = tiny.loss_of(model(tokens), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            parallel.report(step, loss, world)
            step += 1


if __name__ == "__main__":
    parallel.launch(main)
