"""Calls what FlexModel replaces of torch, and of what is built on it, in every way that Python has.

Each call is made in a way chosen at random, from the seed that is the argument, and its outcome is printed: what came
back or what was raised. Without FlexModel the originals are called in the same ways, and print the same.
"""

import copy
import functools
import inspect
import os
import pickle
import random
import re
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

TRIALS = 50


class Thing(nn.Module):
    """Has a parameter, takes what it is given, and raises if that is no tensor."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.full((3,), 2.0))

    def forward(self, x, *, shift=0):
        return x * self.weight + shift


class Mixed(Thing):
    """Says by itself how it is copied, and how it is called."""

    def __reduce_ex__(self, protocol):
        return super().__reduce_ex__(protocol)

    def __setstate__(self, state):
        super().__setstate__(state)

    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs)


class Reduced(nn.Module):
    """As C, say, defines it: behind `nn.Module` in the order of the classes."""

    class Way:
        def __reduce_ex__(self, protocol):
            return int, (protocol,)


class Behind(Thing, Reduced.Way):
    pass


def called(module: nn.Module) -> nn.Module:
    """One that is tapped, if anything is."""
    module(torch.ones(3))
    return module


def bare(cls: type) -> Any:
    """An instance without any attribute."""
    return cls.__new__(cls)


class Target:
    """A function that may be ours, and values for its parameters, made anew for every call."""

    def __init__(self, owner: Any, name: str, *selves: Callable[[], Any], **values: Callable[[], Any]):
        self.owner, self.name, self.selves, self.values = owner, name, selves, values

    @property
    def function(self) -> Any:
        return getattr(self.owner, self.name)

    def call(self, chance: random.Random) -> Any:
        """Calls it in some way."""
        args = [chance.choice(self.selves)()] if self.selves else []
        bound = bool(args) and chance.random() < 0.4
        function, first = self.function, args[0] if args else None
        kwargs = {}
        names = list(self.values)
        positional = chance.randint(0, len(names))
        args += [self.values[name]() for name in names[:positional]]
        for name in names[positional:]:
            if chance.random() < 0.7:
                kwargs[name] = self.values[name]()
        odd = chance.random()
        if odd < 0.1:
            args.append(7)
        elif odd < 0.2:
            kwargs["nonsense"] = 7
        elif odd < 0.3 and names:
            kwargs[names[0]] = self.values[names[0]]()
        elif odd < 0.4 and self.selves:
            kwargs["self"] = args.pop(0)
        elif odd < 0.5:
            args = args[1:]
        elif bound:
            function, args = getattr(first, self.name), args[1:]
        if chance.random() < 0.2 and args:
            function, args = functools.partial(function, args[0]), args[1:]
        return function(*args, **kwargs)


def described(value: Any, depth: int = 0) -> str:
    """The same in every process."""
    if isinstance(value, torch.Tensor):
        return f"{type(value).__name__}{list(value.shape)} {float(value.detach().double().sum()).hex()}"
    if isinstance(value, (tuple, list)) and depth < 4:
        return f"{type(value).__name__}({', '.join(described(item, depth + 1) for item in value)})"
    if isinstance(value, dict) and depth < 4:
        items = [f"{key}={described(item, depth + 1)}" for key, item in value.items()]
        return f"{type(value).__name__}({', '.join(items)})"
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    return getattr(value, "__qualname__", None) or type(value).__qualname__


def outcome(call: Callable[[], Any]) -> str:
    """What a call gave, or raised."""
    try:
        return f"gave {described(call())}"
    except Exception as e:
        return f"raised {type(e).__name__}: " + re.sub(r"0x[0-9a-f]+", "0x", " ".join(str(e).split()))


def look_of(function: Any) -> str:
    """What it says of itself."""
    try:
        signature = str(inspect.signature(function))
    except (TypeError, ValueError) as e:
        signature = type(e).__name__
    about = [getattr(function, name, None) for name in ("__name__", "__qualname__", "__module__", "__doc__")]
    return re.sub(r"0x[0-9a-f]+", "0x", " ".join(map(str, [signature, *about]))).replace("\n", " ")


def of_modules() -> list[Target]:
    kinds = [Thing, Mixed, Behind, lambda: called(Thing()), lambda: called(Mixed())]
    lacking = [lambda: bare(Thing), lambda: bare(Mixed), lambda: 3]
    return [
        Target(nn.Module, "__call__", *kinds, *lacking, x=lambda: torch.ones(3), shift=lambda: 1),
        Target(nn.Module, "__call__", *kinds, *lacking, x=lambda: "no tensor"),
        Target(nn.Module, "__reduce_ex__", *kinds, *lacking, protocol=lambda: 2),
        Target(nn.Module, "__setstate__", *kinds, *lacking, state=lambda: dict(vars(Thing()))),
        Target(nn.Module, "__setstate__", *kinds, *lacking, state=lambda: {}),
        Target(torch.jit._recursive, "get_hook_stubs", nn_module=lambda: called(Thing())),
        Target(torch.jit._recursive, "get_hook_stubs", nn_module=lambda: bare(Thing)),
    ]


def of_scalers() -> list[Target]:
    from torch.amp.grad_scaler import GradScaler
    from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

    class Own(GradScaler):
        def is_enabled(self):
            raise LookupError("not to be asked")

    def scaler(cls=GradScaler, **kwargs):
        return lambda: cls("cpu", init_scale=4.0, **kwargs)

    def used():
        made = scaler()()
        made.scale(torch.ones(()))
        return made

    plain = [scaler(), scaler(enabled=False), scaler(Own), used, lambda: bare(GradScaler)]
    return [
        Target(GradScaler, "scale", *plain, outputs=lambda: torch.ones(2)),
        Target(GradScaler, "scale", *plain, outputs=lambda: [torch.ones(2), (torch.ones(1),)]),
        Target(GradScaler, "scale", *plain, outputs=lambda: "no tensor"),
        Target(GradScaler, "update", *plain, new_scale=lambda: 8.0),
        Target(GradScaler, "update", used, new_scale=lambda: torch.ones(3)),
        Target(ShardedGradScaler, "scale", scaler(ShardedGradScaler), lambda: bare(ShardedGradScaler),
               outputs=lambda: torch.ones(2)),
    ]  # fmt: skip


def of_distributed() -> list[Target]:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.pipelining import PipelineStage, stage
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    mesh = dist.init_device_mesh("cpu", (1,), mesh_dim_names=("dp",))

    class Local(DTensor):
        def to_local(self, *args, **kwargs):
            return super().to_local(*args, **kwargs)

    def tensor(placement):
        return lambda: distribute_tensor(torch.ones(4), mesh, [placement])

    def pipeline():
        return PipelineStage(Thing(), 0, 1, torch.device("cpu"))

    parts = {"num_microbatches": lambda: 1, "args": lambda: (torch.ones(3),), "kwargs": lambda: {}}
    return [
        Target(DTensor, "to_local", tensor(Shard(0)), tensor(Replicate()), lambda: torch.ones(1), lambda: None,
               grad_placements=lambda: [Replicate()]),
        Target(DeviceMesh, "__init__", lambda: bare(DeviceMesh), device_type=lambda: "cpu", mesh=lambda: [0]),
        Target(dist, "init_process_group", backend=lambda: "gloo", rank=lambda: 0, world_size=lambda: 1),
        Target(stage._PipelineStageBase, "__init__", lambda: bare(PipelineStage), submodule=Thing,
               stage_index=lambda: 0, num_stages=lambda: 1, device=lambda: torch.device("cpu"), group=lambda: None),
        Target(PipelineStage, "_prepare_forward_infra", pipeline, lambda: bare(PipelineStage), **parts),
    ]  # fmt: skip


def of_contexts() -> list[Target]:
    from torch.distributed.tensor.experimental._context_parallel import _attention

    mesh = dist.init_device_mesh("cpu", (1,), mesh_dim_names=("cp",))
    return [
        Target(_attention, "_context_parallel_buffers", mesh=lambda: mesh, buffers=lambda: [torch.ones(2, 4)],
               buffer_seq_dims=lambda: [1], load_balancer=lambda: None),
        Target(_attention, "_context_parallel_buffers", mesh=lambda: None, buffers=lambda: 3,
               buffer_seq_dims=lambda: 1),
        Target(_attention, "_disable_context_parallel_dispatcher_impl"),
    ]  # fmt: skip


def of_compiler() -> list[Target]:
    from torch._dynamo import trace_rules
    from torch._dynamo.callback import callback_handler
    from torch._dynamo.compiled_autograd import AutogradCompilerInstance
    from torch._functorch._aot_autograd.runtime_wrappers import FakifiedOutWrapper

    def wrapper():
        made = FakifiedOutWrapper()
        made.out_metas = [torch.ones(1)]
        return made

    class Metadata:
        tokens = ()

    return [
        Target(trace_rules, "check", obj=lambda: torch.add, is_inlined_call=lambda: False),
        Target(trace_rules, "check", obj=lambda: None, is_inlined_call=lambda: True),
        Target(callback_handler, "clear"),
        Target(AutogradCompilerInstance, "dce", lambda: bare(AutogradCompilerInstance)),
        Target(FakifiedOutWrapper, "pre_compile", wrapper, lambda: bare(FakifiedOutWrapper), fw_module=lambda: None,
               flat_args=lambda: [], aot_config=lambda: None, fw_metadata=Metadata),
        Target(FakifiedOutWrapper, "set_fwd_output_strides", wrapper, lambda: bare(FakifiedOutWrapper),
               fwd_output_strides=lambda: [[1]]),
    ]  # fmt: skip


def of_engines() -> list[Target]:
    from deepspeed.runtime.engine import DeepSpeedEngine
    from megatron.core.pipeline_parallel import schedules

    class Engine(DeepSpeedEngine):
        def __init__(self):
            nn.Module.__init__(self)

    steps = {"forward_step_func": lambda: None, "data_iterator": lambda: None, "model": lambda: [Thing()],
             "num_microbatches": lambda: 1, "seq_length": lambda: 2, "micro_batch_size": lambda: 1}  # fmt: skip
    names = [name for name in vars(schedules) if name.startswith("forward_backward_")]
    return [
        Target(DeepSpeedEngine, "__init__", Engine, args=lambda: None, model=Thing),
        Target(DeepSpeedEngine, "backward", Engine, loss=lambda: torch.ones(()), retain_graph=lambda: False,
               scale_wrt_gas=lambda: True),
        *(Target(schedules, name, **steps) for name in names),
    ]  # fmt: skip


def wrapped_by_the_job(chance: random.Random) -> None:
    """The job replaces the same functions, around ours, and puts back what it found."""
    for owner, name in ((nn.Module, "__call__"), (nn.Module, "__reduce_ex__"), (nn.Module, "__setstate__")):
        original = getattr(owner, name)

        @functools.wraps(original)
        def wrapper(*args, original=original, **kwargs):
            return original(*args, **kwargs)

        setattr(owner, name, wrapper)
        module = Thing()
        print("wrapped", name, outcome(lambda module=module: module(torch.ones(3))))
        print("wrapped", name, outcome(lambda module=module: copy.deepcopy(module)(torch.ones(3))))
        setattr(owner, name, original)
        print("restored", name, outcome(lambda: Thing()(torch.ones(3))))
    for make in (Thing, Mixed):
        module = called(make())
        print("pickled", len(pickle.dumps(module)), len(copy.deepcopy(module)._forward_hooks))


def main() -> None:
    warnings.simplefilter("ignore")
    seed = int(sys.argv[1])
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    for make in (of_modules, of_scalers, of_distributed, of_contexts, of_compiler, of_engines):
        for number, target in enumerate(make()):
            label = f"{make.__name__} {number} {target.name}"
            print(label, "is", look_of(target.function))
            chance = random.Random(f"{seed} {label}")
            for trial in range(TRIALS):
                print(label, trial, outcome(lambda target=target, chance=chance: target.call(chance)))
    wrapped_by_the_job(random.Random(seed))
    sys.stdout.flush()
    os._exit(0)  # groups of calls that went half through are not to be taken down in good order


if __name__ == "__main__":
    main()
