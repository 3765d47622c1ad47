"""Trains compiled models for as long as hooks are changed: `live_compiled.py WAYS UNTIL OPTION...`.

`WAYS` are ways to compile a model, one model each, with commas; `train` and `steps`, each alone, compile a step, or
three, with what the optimizer does. `UNTIL` is a number of calls, or a folder in which a file `end` ends the job. While
a file `hold` is there it begins no step, and prints `held`. Options: `fullgraph`, `strict` (nothing may be compiled
again), `apart` (torch traces into none of its own modules), `inductor`, `stance=NAME`, `late=NAME` (set for a part of
each step once there is a file `late`). Prints with each loss how often torch.compile has compiled.
"""

import contextlib
import pathlib
import sys
import time

import torch
from torch import nn

WIDTH = 8


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.act = nn.GELU()
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x):
        return x + self.down(self.act(self.up(x)))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def compiles() -> int:
    return len(torch._dynamo.utils.compilation_time_metrics.get("_compile.compile_inner", []))


def compiled(way: str, model: nn.Module, **options):
    """What is called for `model`."""
    if way == "model":
        return torch.compile(model, **options)
    if way == "itself":
        model.compile(**options)
    if way == "blocks":
        for block in model.blocks:
            block.compile(**options)
    if way == "function":
        return torch.compile(lambda x: model(x), **options)
    return model


def models_of(count: int) -> tuple[list[Model], torch.optim.Optimizer]:
    torch.manual_seed(0)
    models = [Model() for _ in range(count)]
    return models, torch.optim.SGD([p for model in models for p in model.parameters()], lr=0.01)


def batch(number: int) -> torch.Tensor:
    """All calls of a module are alike to torch.compile: what they are given needs gradients."""
    return torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(number)).requires_grad_()


def step_of(calls: list, optimizer: torch.optim.Optimizer):
    """A step of the models that `calls` call."""

    def step(x):
        optimizer.zero_grad()
        loss = sum(call(x).square().mean() for call in calls)
        loss.backward()
        optimizer.step()
        return loss

    return step


def whole_step_of(model: nn.Module, optimizer: torch.optim.Optimizer):
    """As one function without another in it."""

    def train(x):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    return train


def three_of(train):
    def steps(x):
        for _ in range(3):
            loss = train(x)
        return loss

    return steps


def main() -> None:
    ways, until, *options = sys.argv[1:]
    torch.set_num_threads(1)
    config = torch._dynamo.config
    config.error_on_recompile = "strict" in options
    config.inline_inbuilt_nn_modules = "apart" not in options
    how = {"backend": "inductor" if "inductor" in options else "aot_eager", "fullgraph": "fullgraph" in options}
    named = dict(option.split("=") for option in options if "=" in option)
    models, optimizer = models_of(len(ways.split(",")))
    if ways in ("train", "steps"):
        step = whole_step_of(models[0], optimizer)
        step = torch.compile(three_of(step) if ways == "steps" else step, **how)
    else:
        calls = [compiled(way, model, **how) for way, model in zip(ways.split(","), models, strict=True)]
        step = step_of(calls, optimizer)
    if "stance" in named:
        torch.compiler.set_stance(named["stance"])
    folder = pathlib.Path(until)
    number = 0
    while number < int(until) if until.isdigit() else not (folder / "end").exists():
        while (folder / "hold").exists():
            print("held", flush=True)
            time.sleep(0.1)
        stance = contextlib.nullcontext()
        if (folder / "late").exists():
            stance = torch.compiler.set_stance(named["late"])
        with stance:
            loss = step(batch(number))
        print(f"step {number} loss {loss.item().hex()} compiles {compiles()}", flush=True)
        number += 1
        time.sleep(0 if until.isdigit() else 0.02)


if __name__ == "__main__":
    main()
