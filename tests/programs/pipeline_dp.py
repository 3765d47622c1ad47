"""A pipeline of two stages, whose ranks share the batch, on four ranks: `pipeline_dp.py HOW...`, one by one.

ddp     a stage in DDP
fsdp2   its layers sharded
"""

import sys

import parallel
import pipeline
import tiny
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.nn.parallel import DistributedDataParallel

STEPS = 2
# Of each rank, in two microbatches.
ROWS = 4


def build(how: str, mesh: DeviceMesh) -> torch.nn.Module:
    model = pipeline.stage_of(pipeline.build(), mesh["pp"].get_local_rank(), 2)
    if how == "ddp":
        # Without that argument torch 2.15 fails in the second step: it counts parameters in every microbatch.
        return DistributedDataParallel(model, process_group=mesh["dp"].get_group(), find_unused_parameters=True)
    for layer in model.layers.values():
        fully_shard(layer, mesh=mesh["dp"])
    return fully_shard(model, mesh=mesh["dp"])


def train(how: str, mesh: DeviceMesh) -> None:
    model = build(how, mesh)
    number = mesh["pp"].get_local_rank()
    stage = PipelineStage(model, number, 2, torch.device("cpu"), group=mesh["pp"].get_group())
    schedule = Schedule1F1B(stage, n_microbatches=2, loss_fn=tiny.loss_of)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(STEPS):
        tokens, targets = tiny.batch(step, [ROWS, ROWS], mesh["dp"].get_local_rank())
        loss = pipeline.advance(schedule, optimizer, tokens, targets, number == 0)
        # Only last stages have one.
        parallel.report(step, loss, 2)


def main(*names: str) -> None:
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("pp", "dp"))
    for name in names:
        train(name, mesh)


if __name__ == "__main__":
    parallel.launch(main, *sys.argv[1:])
