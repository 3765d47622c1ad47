"""Scaled losses: `scaled.py scaler|loaded|deepspeed`, a GradScaler whose scale changes, also by a state that is loaded,
or DeepSpeed's accumulation. Prints how often anything looked at a tensor's value while the scaler did its work.
"""

import os
import sys

import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode

STEPS = 3
LOADED = 256.0


class Looks(TorchDispatchMode):
    """Counts what makes a job wait for its device."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def scaler(loads: bool) -> None:
    model = tiny.build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1)
    for step in range(STEPS):
        tokens, targets = tiny.batch(step, [4], 0)
        loss = tiny.loss_of(model(tokens), targets)
        optimizer.zero_grad()
        with Looks() as looks:
            scaled = scaler.scale(loss)
        scaled.backward()
        with looks:
            scaler.step(optimizer)
            scaler.update()
        print("looks", looks.count)
        if loads and step == 0:
            scaler.load_state_dict(scaler.state_dict() | {"scale": LOADED})
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
    accumulating() if sys.argv[1] == "deepspeed" else scaler(sys.argv[1] == "loaded")
