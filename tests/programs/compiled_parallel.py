"""torch.compile of a distributed model: `compiled_parallel.py BACKEND ddp|fsdp2...`."""

import gc
import sys

import compiled
import parallel
import tiny
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel


def build(backend: str, how: str):
    model = tiny.build()
    if how == "ddp":
        return torch.compile(DistributedDataParallel(model, bucket_cap_mb=0.02), backend=backend)
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for layer in model.layers:
        layer.compile(backend=backend, fullgraph=True)
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def main(backend: str, *hows: str) -> None:
    # So that DDP's model has several buckets, which torch.compile makes graphs of their own for, also inside of blocks.
    torch.distributed._DEFAULT_FIRST_BUCKET_BYTES = 1 << 14
    for how in hows:
        torch._dynamo.reset()
        model = build(backend, how)
        parallel.train(model, torch.optim.SGD(model.parameters(), lr=0.1))
        if torch.distributed.get_rank() == 0:
            compiled.report_compiler()
        del model
        gc.collect()


if __name__ == "__main__":
    parallel.launch(main, *sys.argv[1:])
