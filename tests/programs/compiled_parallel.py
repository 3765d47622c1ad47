"""torch.compile of distributed models, one by one: `compiled_parallel.py compiled|plain HOW...`.

fsdp2        blocks compiled in place, then sharded
fsdp2-model  the sharded model compiled in place, which breaks the graph where FSDP gathers
ddp          by DDP's way, a graph for each bucket, which may end inside of a module
ddp-whole    in one graph
tp           tensor parallel with local tensors between modules, the model
dtensor      tensor parallel with DTensors between modules, the blocks
"""

import gc
import sys

import compiled_cases
import parallel
import tensor_parallel
import tiny
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

BACKEND = "aot_eager"


def compile_blocks(model, compiled: bool) -> None:
    for layer in model.layers if compiled else ():
        layer.compile(backend=BACKEND, fullgraph=True)


def build(how: str, compiled: bool):
    name, _, variant = how.partition("-")
    if name == "ddp":
        torch._dynamo.config.optimize_ddp = variant != "whole"
        model = DistributedDataParallel(tiny.build(layers=1), bucket_cap_mb=0.02)
        return torch.compile(model, backend=BACKEND) if compiled else model
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp" if name == "fsdp2" else "tp",))
    if name == "fsdp2":
        model = tiny.build(layers=1)
        compile_blocks(model, compiled and variant == "")
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    else:
        style = "local" if name == "tp" else "dtensor"
        model = tensor_parallel.parallelize(tensor_parallel.build(style), mesh, style)
        compile_blocks(model, compiled and name == "dtensor")
    if compiled and (variant == "model" or name == "tp"):
        model.compile(backend=BACKEND, fullgraph=name == "tp")
    return model


def train(model, seat: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(2):
        tokens, targets = tiny.batch(step, [4, 4], seat)
        loss = tiny.loss_of(model(tokens), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        parallel.report(step, loss, dist.get_world_size())


def main(compiled: str, *hows: str) -> None:
    # So that DDP's model has several buckets, also inside of blocks.
    dist._DEFAULT_FIRST_BUCKET_BYTES = 1 << 14
    for how in hows:
        torch._dynamo.reset()
        model = build(how, compiled == "compiled")
        train(model, dist.get_rank() if how.startswith(("fsdp2", "ddp")) else 0)
        if compiled == "compiled" and dist.get_rank() == 0:
            compiled_cases.report_compiler()
        del model
        gc.collect()


if __name__ == "__main__":
    parallel.launch(main, *sys.argv[1:])
