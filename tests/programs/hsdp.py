"""Replicas 2 x shards 2 on four ranks: `hsdp.py KIND...`, of fsdp1 and fsdp2, one after another."""

import functools
import sys

import parallel
import tiny
import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

STEPS = 2
SIZES = (2, 2, 2, 2)


def fsdp1(model: tiny.Net, mesh: DeviceMesh) -> torch.nn.Module:
    return FullyShardedDataParallel(
        model,
        device_mesh=mesh,
        sharding_strategy=ShardingStrategy.HYBRID_SHARD,
        auto_wrap_policy=functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={tiny.Block}),
        use_orig_params=True,
        device_id=torch.device("cpu"),
    )


def fsdp2(model: tiny.Net, mesh: DeviceMesh) -> torch.nn.Module:
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train(kind: str) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = {"fsdp1": fsdp1, "fsdp2": fsdp2}[kind](tiny.build(), mesh)
    parallel.train(model, torch.optim.SGD(model.parameters(), lr=0.1), STEPS, SIZES)


def main(*args: str) -> None:
    for arg in args:
        train(arg)


if __name__ == "__main__":
    parallel.launch(main, *sys.argv[1:])
