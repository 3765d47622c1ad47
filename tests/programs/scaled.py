"""Scaled losses: `scaled.py scaler|deepspeed`, a GradScaler whose scale changes, or DeepSpeed's accumulation."""

import os
import sys

import tiny
import torch

STEPS = 3


def scaler() -> None:
    model = tiny.build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1)
    for step in range(STEPS):
        tokens, targets = tiny.batch(step, [4], 0)
        loss = tiny.loss_of(model(tokens), targets)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        tiny.report(0, step, loss)


def accumulating() -> None:
    import deepspeed

    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=sys.argv[2])
    deepspeed.init_distributed("gloo")
    model = tiny.build()
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    for step in range(STEPS):
        tokens, targets = tiny.batch(step, [4], 0)
        loss = tiny.loss_of(engine(tokens), targets)
        engine.backward(loss)
        engine.step()
        tiny.report(0, step, loss)
    engine.destroy()


if __name__ == "__main__":
    torch.set_num_threads(1)
    scaler() if sys.argv[1] == "scaler" else accumulating()
