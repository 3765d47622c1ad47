"""A model that torch.compile finds again in its caches: `cached.py train|infer|save FILE|load FILE|factors`.

Prints what the caches were asked for.
"""

import collections
import os
import sys

import tiny
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
        self.first = nn.Linear(WIDTH, WIDTH)
        self.block = Block()

    def forward(self, x):
        return self.block(self.first(x)).square()


def batch(step: int) -> torch.Tensor:
    return torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(step))


def train(model) -> None:
    """The block by itself, then the whole: graphs with taps in them, and graphs with none."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.first.compile()
    model.block.compile()
    for step in range(3):
        optimizer.zero_grad()
        loss = model(batch(step)).mean()
        loss.backward()
        optimizer.step()
        tiny.report(0, step, loss)


def infer(call) -> None:
    with torch.no_grad():
        for step in range(2):
            tiny.report(0, step, call(batch(step)).mean())


def report_caches() -> None:
    counters = torch._dynamo.utils.counters
    found = collections.Counter()
    for group in ("inductor", "aot_autograd", "dynamo_cache"):
        found.update({name: n for name, n in counters[group].items() if "cache" in name})
    print("caches", *(f"{name} {n}" for name, n in sorted(found.items())), flush=True)


def main(how: str, *args: str) -> None:
    torch.set_num_threads(1)
    # So that inductor tries out no compiler options, and no processes of its own.
    torch._inductor.config.cpp.vec_isa_ok = False
    torch._inductor.config.compile_threads = 1
    torch._dynamo.config.enable_aot_compile = True
    torch.manual_seed(0)
    model = Model()
    if how == "train":
        train(model)
    elif how == "infer":
        infer(torch.compile(model.eval(), fullgraph=True))
    elif how == "save":
        infer(model.eval())  # whoever has hooks on it has them now
        with torch.no_grad():
            compiled = torch.compile(model.forward, fullgraph=True).aot_compile(((batch(0),), {}))
        compiled.save_compiled_function(*args)
        infer(lambda x: compiled(model, x))
    elif how == "load":
        infer(model.eval())
        with open(*args, "rb") as file:
            compiled = torch.compiler.load_compiled_function(file)
        infer(lambda x: compiled(model, x))
    elif how == "factors":
        import vllm.envs

        infer(torch.compile(model.eval(), fullgraph=True, backend="eager"))
        print("factors", *sorted(vllm.envs.compile_factors().items()))
    # What a job may ship to other machines; it also writes what is precompiled.
    if os.environ.get("SAVE_ARTIFACTS"):
        torch.compiler.save_cache_artifacts()
    report_caches()


if __name__ == "__main__":
    main(*sys.argv[1:])
