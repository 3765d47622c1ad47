"""DeepSpeed with a loss that is not finite in one step, which DeepSpeed skips: `zero_skips.py CASES...`, one by one.
A case is a stage and a type: `0-fp16`, `3-bf16`; `1-fp32` is bf16 with gradients that are accumulated in fp32.
"""

import sys

import deepspeed
import parallel
import tiny
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

STEPS = 4
# The step whose gradients are not finite.
BROKEN = 2
SCALE_POWER = 8


def train(stage: str, dtype: str) -> None:
    model = tiny.build()
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": int(stage), "stage3_param_persistence_threshold": 0, "overlap_comm": False},
        "zero_allow_untested_optimizer": True,
    }
    if dtype == "fp16":
        config["fp16"] = {"enabled": True, "initial_scale_power": SCALE_POWER, "hysteresis": 1}
    else:
        config["bf16"] = {"enabled": True, "check_grad_overflow": True}
    if dtype == "fp32":
        config["data_types"] = {"grad_accum_dtype": dtype}
    # As where some parameters alone decay.
    groups = [[p for p in model.parameters() if (p.ndim == 1) == is_vector] for is_vector in (False, True)]
    optimizer = torch.optim.SGD([{"params": group} for group in groups], lr=0.1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    for step in range(STEPS):
        tokens, targets = tiny.batch(step, [4, 4], dist.get_rank())
        loss = tiny.loss_of(engine(tokens).float(), targets) * (float("inf") if step == BROKEN else 1)
        engine.backward(loss)
        engine.step()
        parallel.report(step, loss, dist.get_world_size())
    assert engine.skipped_steps == 1, engine.skipped_steps
    engine.destroy()


def main(*cases: str) -> None:
    # What DeepSpeed does in fp16 it does on every device that it takes for one that can.
    get_accelerator().is_fp16_supported = lambda: True
    for case in cases:
        train(*case.split("-"))


if __name__ == "__main__":
    deepspeed.init_distributed("gloo")
    parallel.launch(main, *sys.argv[1:])
