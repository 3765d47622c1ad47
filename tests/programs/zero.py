"""DeepSpeed ZeRO, with parameters really partitioned in stage 3: `zero.py 1|2|3...`, one after another."""

import sys

import deepspeed
import parallel
import tiny
import torch
import torch.distributed as dist


def train(stage: int, steps: int = 3) -> None:
    model = tiny.build()
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 0,
            "reduce_bucket_size": 4096,
            "stage3_prefetch_bucket_size": 4096,
            "overlap_comm": False,
        },
        "zero_allow_untested_optimizer": True,
        "wall_clock_breakdown": False,
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    for step in range(steps):
        tokens, targets = tiny.batch(step, [4, 4], dist.get_rank())
        loss = tiny.loss_of(engine(tokens), targets)
        engine.backward(loss)
        engine.step()
        parallel.report(step, loss, dist.get_world_size())
    engine.destroy()


def main(*stages: int) -> None:
    for stage in stages:
        train(stage)


if __name__ == "__main__":
    deepspeed.init_distributed("gloo")
    parallel.launch(main, *map(int, sys.argv[1:]))
