"""Canonical names, of the model as its author wrote it, without those of wrappers; and the one walk through a model."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from .faults import reason

# What the adapters in `frameworks` say of their names (`Adapter` describes each). They say it before they are present:
# names must not depend on what has been imported already.
_PRIVATE: set[str] = set()
_WRAPPERS: set[tuple[str, str]] = set()
_NUMBERED: set[tuple[str, str]] = set()
_SUBCLASS_PREFIXES: set[str] = set()


def know(adapter: Any) -> None:
    """Take in what an adapter says of names."""
    _PRIVATE.update(adapter.private_children)
    _WRAPPERS.update(adapter.wrappers)
    _NUMBERED.update(adapter.numbered)
    _SUBCLASS_PREFIXES.update(adapter.subclass_prefixes)


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
    """Whether it is a module, by its type: `__class__` is the job's to define."""
    return issubclass(type(value), nn.Module)


def held_by(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Its children, by their names in it."""
    children = own(module, "_modules", {}).items()
    return [(key, child) for key, child in children if is_module(child)]


def all_in(top: nn.Module) -> list[nn.Module]:
    """It and every module below it, parents first. Never by `modules()`: a class of the job may have overridden that,
    as it may every other method."""
    found: dict[int, nn.Module] = {}
    stack = [top]
    while stack:
        module = stack.pop()
        if id(module) not in found:
            found[id(module)] = module
            stack.extend(child for _, child in reversed(held_by(module)))
    return list(found.values())


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


def walk(top: nn.Module) -> list[tuple[str | None, nn.Module]]:
    """Every module of a model, once, with its canonical name, parents first; the model itself is ''.

    Wrappers have no name, nor has what only a wrapper or a module of torch.jit holds. A module that is there twice has
    its first name. A layer that knows its number in the whole model, of which this may be a stage, has that.
    """
    found: dict[int, tuple[str | None, nn.Module]] = {}
    stack: list[tuple[str | None, nn.Module]] = [("", top)]
    children: list[tuple[str | None, nn.Module]]
    while stack:
        name, module = stack.pop()
        inner = unwrapped(module)
        known = found.get(id(module))
        # A wrapper passes its name on. A module may be met without a name first.
        if known is not None and (name is None or known[0] is not None):
            continue
        found[id(module)] = (name if inner is None else None, module)
        if inner is not None:
            others = [(None, child) for _, child in held_by(module) if child is not inner]
            children = [(name, inner), *others]
        elif name is None or is_scripted(module):
            children = [(None, child) for _, child in held_by(module)]
        else:
            children = [(f"{name}.{key}" if name else key, child) for key, child in _numbered(module)]
        stack.extend(reversed(children))
    return list(found.values())


def _numbered(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Its children, layers that know their number under that, from 0."""
    children = held_by(module)
    if type(module) is not nn.ModuleList:
        return children
    layers = [authored(child) for _, child in children]
    numbers = [own(layer, "layer_number", None) if _is_of(layer, _NUMBERED) else None for layer in layers]
    if not all(type(number) is int and number > 0 for number in numbers) or len(set(numbers)) < len(numbers):
        return children
    return [(str(number - 1), child) for number, (_, child) in zip(numbers, children, strict=True)]


def is_instance(value: object, module: str, name: str) -> bool:
    """Whether `value` is of a class that may not be imported."""
    cls = getattr(sys.modules.get(module), name, None)
    return isinstance(cls, type) and issubclass(type(value), cls)


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
        for _, child in held_by(module):
            parents.setdefault(id(authored(child)), []).append(module)
    found: set[int] = set()
    stack = [id(module) for module in wanted]
    while stack:
        above = {id(parent) for parent in parents.get(stack.pop(), ())} - found
        found |= above
        stack.extend(above)
    return [module for module in modules if id(module) in found]
