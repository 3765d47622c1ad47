"""A small Llama of transformers on the same global batches: `llama.py one|fsdp2|fsdp2_tp`.

one       one process has all rows
fsdp2     every rank has its rows, and a shard of every parameter
fsdp2_tp  pairs of ranks share rows, and have half of the heads and of the hidden features each; four ranks
"""

import sys

import parallel
import tiny
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from tp_llama import build, loss_of

STEPS = 2
ROWS = 8


def plan() -> dict:
    """Of a layer."""
    cut = {f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"}
    cut |= {f"mlp.{name}_proj": ColwiseParallel() for name in ("gate", "up")}
    return cut | {"self_attn.o_proj": RowwiseParallel(), "mlp.down_proj": RowwiseParallel()}


def distribute(model: torch.nn.Module, how: str):
    """Wraps the model, and returns this rank's number among those with rows of their own, and how many these are."""
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (2, world // 2) if how == "fsdp2_tp" else (world, 1), mesh_dim_names=("dp", "tp"))
    for layer in model.model.layers:
        if how == "fsdp2_tp":
            parallelize_module(layer, mesh["tp"], plan())
        fully_shard(layer, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    return mesh["dp"].get_local_rank(), mesh["dp"].size()


def main(how: str) -> None:
    model = build()
    place, places = (0, 1) if how == "one" else distribute(model, how)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(STEPS):
        loss = loss_of(model, *tiny.batch(step, [ROWS // places] * places, place))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if how == "one":
            tiny.report(0, step, loss)
        else:
            parallel.report(step, loss, dist.get_world_size())


if __name__ == "__main__":
    if sys.argv[1] == "one":
        torch.set_num_threads(1)
        main("one")
    else:
        parallel.launch(main, sys.argv[1])
