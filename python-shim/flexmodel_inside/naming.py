"""Canonical names: those of the model as its author wrote it, whatever wrapped it since."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .faults import reason

# Children whose name alone says that they are the wrapped module.
_PRIVATE = ("_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module")

# Classes whose child `module` is the wrapped module. A child of that name in any other class is the author's.
_WRAPPERS = {
    ("torch.nn.parallel.distributed", "DistributedDataParallel"),
    ("torch.nn.parallel.data_parallel", "DataParallel"),
    ("torch.optim.swa_utils", "AveragedModel"),
    ("deepspeed.runtime.engine", "DeepSpeedEngine"),
    ("megatron.core.distributed.distributed_data_parallel", "DistributedDataParallel"),
    ("megatron.core.transformer.module", "Float16Module"),
}

# Classes whose `layer_number`, from 1, counts the layers of the whole model, of which there may be a stage here.
_NUMBERED = {("megatron.core.transformer.module", "MegatronModule")}

# What torch puts before a class's name when it swaps in a subclass.
_SUBCLASS_PREFIXES = ("FSDP", "DDP", "Parametrized")


def own(module: nn.Module, name: str, default: Any) -> Any:
    """An attribute of the module itself. Never by `__dict__`: asking for it makes Python build one for good, and every
    later attribute of that module is then slower to find."""
    try:
        return object.__getattribute__(module, name)
    except AttributeError:
        return default
    except BaseException as e:  # of a property
        if reason(e) is None:
            raise
        return default


def stored(module: nn.Module) -> dict[str, torch.Tensor]:
    """A module's own parameters by name, as they are. Never through the module, nor by its dict's own methods: under
    DeepSpeed ZeRO-3 these may start a collective of the job's."""
    return {key: value for key, value in dict.items(own(module, "_parameters", {})) if value is not None}


def is_module(value: object) -> bool:
    """Whether it is a module. By its type: what it says of its class is the job's own."""
    return issubclass(type(value), nn.Module)


def held_by(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules that it holds, whatever they are, and their names in it."""
    children = own(module, "_modules", {}).items()
    return [(key, child) for key, child in children if is_module(child)]


def all_in(top: nn.Module) -> list[nn.Module]:
    """It and every module below it, whatever they are, parents first. Never by `modules()`: a class of the job may have
    replaced that by something of its own, as it may every other method."""
    found: dict[int, nn.Module] = {}
    stack = [top]
    while stack:
        module = stack.pop()
        if id(module) not in found:
            found[id(module)] = module
            stack.extend(child for _, child in reversed(held_by(module)))
    return list(found.values())


def children_of(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Those that can be tapped. Modules of torch.jit take no hooks, and run what they hold outside of Python."""
    if is_scripted(module):
        return []
    return [(key, child) for key, child in held_by(module) if not is_scripted(child)]


def is_scripted(module: nn.Module) -> bool:
    """Whether torch.jit made it."""
    return issubclass(type(module), torch.jit.ScriptModule)


def unwrapped(module: nn.Module) -> nn.Module | None:
    """The module inside a wrapper; None if `module` is no wrapper."""
    if is_scripted(module):
        return None
    children = own(module, "_modules", {})
    for name in _PRIVATE:
        if children.get(name) is not None:
            return children[name]
    if _is_of(module, _WRAPPERS):
        return children.get("module")
    return None


def authored(module: nn.Module) -> nn.Module:
    """`module` without the wrappers around it."""
    while (inner := unwrapped(module)) is not None:
        module = inner
    return module


def authored_class(module: nn.Module) -> type:
    """The class its author gave it: fully_shard and parametrizations swap in a subclass, such as `FSDPLinear`."""
    cls = type(module)
    while str(cls.__module__).startswith("torch."):
        base = next(
            (b for b in cls.__bases__ if cls.__name__ in {prefix + b.__name__ for prefix in _SUBCLASS_PREFIXES}), None
        )
        if base is None:
            break
        cls = base
    return cls


def named(top: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Canonical name and module for all of a model, parents first; the model itself is ''.

    A module that is there twice has its first name. A layer of megatron-core's has the number that it has in the whole
    model, of which this may be a stage.
    """
    seen: set[int] = set()
    stack = [("", authored(top))]
    while stack:
        name, module = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield name, module
        children = [(f"{name}.{key}" if name else key, authored(child)) for key, child in _numbered(module)]
        stack.extend(reversed(children))


def _numbered(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Its children that can be tapped, megatron-core's layers under their numbers, from 0, in the whole model."""
    children = children_of(module)
    if type(module) is not nn.ModuleList:
        return children
    layers = [authored(child) for _, child in children]
    numbers = [own(layer, "layer_number", None) if _is_of(layer, _NUMBERED) else None for layer in layers]
    if not all(type(number) is int and number > 0 for number in numbers) or len(set(numbers)) < len(numbers):
        return children
    return [(str(number - 1), child) for number, (_, child) in zip(numbers, children, strict=True)]


def _is_of(module: nn.Module, classes: set[tuple[str, str]]) -> bool:
    """Whether it is of one of `classes`, or of one made from these."""
    return any((c.__module__, c.__name__) in classes for c in type(module).__mro__)


def is_called_in_parts(modules: list[nn.Module], called: nn.Module) -> bool:
    """Whether the job calls modules inside of a model rather than the model, the first of its `modules`: it has no
    forward, or is not the one that is `called` now though it holds it."""
    model, *parts = modules
    called = authored(called)
    return type(model).forward is nn.Module.forward or any(part is called for part in parts)


def holders(modules: list[nn.Module], wanted: list[nn.Module]) -> list[nn.Module]:
    """Those of a model's `modules` that have one of `wanted` anywhere below them."""
    parents: dict[int, list[nn.Module]] = {}
    for module in modules:
        for _, child in children_of(module):
            parents.setdefault(id(authored(child)), []).append(module)
    found: set[int] = set()
    stack = [id(module) for module in wanted]
    while stack:
        above = {id(parent) for parent in parents.get(stack.pop(), ())} - found
        found |= above
        stack.extend(above)
    return [module for module in modules if id(module) in found]
