"""Data parallel 2 x tensor parallel 2, by `parallelize_module` and then `fully_shard`: `fsdp2_tp.py STYLE...`

The styles are those of tensor_parallel.py.
"""

import sys

import parallel
import tensor_parallel
import tiny
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

STEPS = 2
SIZES = (4, 4)


def train(style: str) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = tensor_parallel.parallelize(tensor_parallel.build(style), mesh["tp"], style)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(STEPS):
        tokens, targets = tiny.batch(step, list(SIZES), mesh["dp"].get_local_rank())
        with tensor_parallel.loss_context(style):
            loss = tiny.loss_of(model(tokens), targets)
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        loss = tensor_parallel.whole(loss)
        dist.all_reduce(loss, group=mesh.get_group("dp"))
        tiny.report(dist.get_rank(), step, loss / mesh["dp"].size())


def main(*args: str) -> None:
    for arg in args:
        train(arg)


if __name__ == "__main__":
    parallel.launch(main, *sys.argv[1:])
