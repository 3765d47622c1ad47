"""One process that takes itself for the first of two ranks, in torch's group without others. Its store knows
nothing: that of torch 2.11 cannot be cloned, that of 2.15 has the same answer to everything.
"""

import tiny
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    model = tiny.build(layers=1)
    for step in range(2):
        tokens, targets = tiny.batch(step, [4], 0)
        tiny.report(0, step, tiny.loss_of(model(tokens), targets).detach())
