"""Trains while FlexModel fails in this process, and goes on: `undone.py REPORT [fail] [infer]`.

With `fail`, something in FlexModel raises after some steps. With `infer`, models are only called. What it did to torch
is written to REPORT, at the end, and what runs of it afterwards. Without FlexModel it does and prints the same, and
there is no report.
"""

import copy
import functools
import pathlib
import pickle
import sys
import warnings

import deepspeed.runtime.engine  # noqa: F401
import megatron.core.pipeline_parallel.schedules  # noqa: F401
import torch
import torch._dynamo.aot_compile
import torch._dynamo.package
import torch.distributed as dist
import torch.distributed.fsdp.sharded_grad_scaler
import torch.distributed.pipelining
import torch.distributed.tensor
import torch.distributed.tensor.experimental._context_parallel._attention
from torch import nn
from torch.amp.grad_scaler import GradScaler

STEPS, WIDTH = 3, 4
# Replaced by the job itself, around what FlexModel has there.
WRAPPED = ((nn.Module, "__setstate__"), (nn.Module, "__reduce_ex__"), (GradScaler, "scale"))


def inside(name: str):
    """A module of FlexModel's, if it is in this process."""
    return sys.modules.get(f"flexmodel_inside.{name}")


def wrap_like_a_job() -> None:
    for owner, name in WRAPPED:
        original = getattr(owner, name)

        @functools.wraps(original)
        def wrapper(*args, original=original, **kwargs):
            return original(*args, **kwargs)

        setattr(owner, name, wrapper)


class Graphs:
    """A backend that counts the functions of FlexModel's in what it is given."""

    def __init__(self):
        self.taps = 0

    def __call__(self, graph, inputs):
        homes = [str(getattr(node.target, "__module__", "")) for node in graph.graph.nodes]
        self.taps += sum(home.startswith("flexmodel_inside") for home in homes)
        return graph


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


def train(compiled: bool) -> int:
    """Steps of a new model. Returns how often a graph has a tap."""
    torch.manual_seed(1)
    model, graphs = Block(), Graphs()
    called = torch.compile(model, backend=graphs) if compiled else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = GradScaler("cpu", init_scale=8.0)
    for step in range(STEPS):
        loss = called(torch.full((2, WIDTH), float(step + 1))).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        print("step", step, "loss", float(loss.detach()).hex())
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    kept = [sorted(name for name, value in vars(module).items() if value) for module in twin.modules()]
    print("copied", kept, float(twin(torch.ones(1, WIDTH)).sum()).hex())
    return graphs.taps


def infer(compiled: bool) -> int:
    """Calls of a new model, in whose life there is no optimizer and no graph."""
    torch.manual_seed(1)
    model = Block()
    with torch.no_grad():
        for step in range(STEPS):
            print("step", step, "output", float(model(torch.full((2, WIDTH), float(step + 1))).sum()).hex())
    return 0


def fail() -> None:
    """The next look at models raises."""
    discovery = inside("discovery")
    if discovery is not None:

        def broken() -> None:
            raise LookupError("broken by the test")

        discovery.rank_and_world = broken


def count_followers() -> list[str]:
    """The names of what FlexModel does beside functions of torch's, from now on."""
    found: list[str] = []
    faults = inside("faults")
    if faults is not None:
        original = faults.Faults.of

        def of(self, name, *rest, **options):
            if name.startswith("following"):
                found.append(name)
            return original(self, name, *rest, **options)

        faults.Faults.of = of
    return found


def main(report: str, *how: str) -> None:
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    wrap_like_a_job()
    use = infer if "infer" in how else train
    taps = [use(compiled=False), use(compiled=True)]
    if "fail" in how:
        fail()
    Block()(torch.ones(1, WIDTH))
    followers = count_followers()
    taps += [use(compiled=False), use(compiled=True)]
    mesh = dist.init_device_mesh("cpu", (1,), mesh_dim_names=("dp",))
    print(torch.distributed.tensor.distribute_tensor(torch.ones(3), mesh).to_local().sum())
    patches = inside("patches")
    if patches is not None:
        lines = [f"patch {patch}" for patch in patches.made()]
        lines += [f"follower {name}" for name in followers]
        lines += ["taps " + " ".join(map(str, taps))]
        pathlib.Path(report).write_text("\n".join(lines) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
