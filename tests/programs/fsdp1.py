"""FullyShardedDataParallel, nested by block: `fsdp1.py orig|flat...`, one after another."""

import functools
import sys

import parallel
import tiny
import torch
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy


def train(params: str) -> None:
    policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={tiny.Block, tiny.Mlp})
    model = FullyShardedDataParallel(
        tiny.build(), auto_wrap_policy=policy, use_orig_params=params == "orig", device_id=torch.device("cpu")
    )
    parallel.train(model, torch.optim.SGD(model.parameters(), lr=0.1))


def main(*args: str) -> None:
    for arg in args:
        train(arg)


if __name__ == "__main__":
    parallel.launch(main, *sys.argv[1:])
