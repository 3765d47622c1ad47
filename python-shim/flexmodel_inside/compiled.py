"""Taps inside of torch.compile: what our hooks are while it traces.

A hook that runs is a C callable. While torch.compile traces, it is this Python instead, which becomes operations in the
graph (`cxx-bridge/cpp/operations.cc`). Blocks of one class share one graph, so whatever differs between them is no
constant in it: a hook's number is a tensor, our hooks are under the same keys in every module, and where any module of
a class has a tap, the others have a hook without one (`uniform_hooks.py`).

Methods of hooks are what torch.compile reads; it puts the functions that they call into its graph as they are, and
runs these when it knows what a DTensor is made of, and what autograd's graph is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from . import hooks
from ._bridge import FLAG_BEFORE as _PRE
from ._bridge import FLAG_GRADIENTS as _GRADIENTS
from ._bridge import FLAG_TRAINING as _TRAINING
from ._bridge import KINDS_OF_GRADIENTS as _OF_GRADIENTS
from ._bridge import KINDS_OF_INPUT_GRADIENTS as _OF_INPUT_GRADIENTS
from ._bridge import KINDS_OF_INPUTS as _OF_INPUTS
from ._bridge import KINDS_OF_OUTPUTS as _OF_OUTPUTS
from ._bridge import REFUSAL_NONE as _READABLE
from ._bridge import REFUSAL_RAISED as _RAISED
from .naming import stored
from .patches import undone

# Keys of our hooks in a module, which its own hooks never have. A module may mark the passes of several models.
TAP_KEY, PASS_KEY = -1, -1000

# For `_tap` alone, which passes it to no operation: outputs lie as inputs of the same shape do.
_KEEPS = 1 << 30

_MAX_DEPTH = 32

_bridge: Any = None
# `_bridge.part`, or None where that raises.
_part_if_any: Any = None


def ready(bridge: Any, guard: Callable[..., Any]) -> list[Callable]:
    """The functions that torch.compile is to have in its graphs as they are."""
    global _bridge, _part_if_any
    _bridge, _part_if_any = bridge, guard(bridge.part)
    bridge.edit_with(_edited)
    return [_tap, _forward_pass, _edit, _watch_inputs, _watch_outputs]


class Traced:
    """A hook that torch.compile can trace. Elsewhere it is the C callable, or nothing where that is None."""

    # The job may ask for it, as of any function that is a hook.
    __name__ = "flexmodel"
    # How many arguments it is given where it is registered. Called in another way, it does nothing.
    takes = 3

    def __init__(self, hook: Any, number: torch.Tensor, kinds: int, edits: int, flags: int) -> None:
        self.hook = hook
        self.number = number
        # Of every module that shares a graph with this one.
        self.kinds = kinds
        self.edits = edits
        self.flags = flags

    def __reduce__(self) -> Any:
        return self.hook.__reduce__() if self.hook is not None else (_nothing, ())

    def padding(self) -> Traced:
        """A hook that makes the same graph, and does nothing."""
        return type(self)(None, _bridge.number(), self.kinds, self.edits, self.flags)

    def release(self) -> None:
        """From now on it does nothing. A graph that it is in stays as it is."""
        self.hook = None
        _bridge.renumber(self.number, None)

    def covers(self, other: Traced) -> bool:
        """Whether a graph that this is in does all that `other` would."""
        is_same = type(self) is type(other) and self.flags == other.flags
        return is_same and not (other.kinds & ~self.kinds or other.edits & ~self.edits)

    def take(self, other: Traced) -> bool:
        """From now on it does what `other` does, of the same class. Whether graphs that it is in have to be made anew
        for that."""
        grows = not self.covers(other)
        self.flags = other.flags
        self.kinds |= other.kinds
        self.edits |= other.edits
        _bridge.renumber(self.number, other.number)
        self.hook = other.hook
        return grows

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs or len(args) != self.takes:
            return None
        if not torch.compiler.is_compiling():
            return self.hook(*args) if self.hook is not None else None
        if torch.compiler._is_exporting_flag or is_off():
            return None
        return self.trace(*args)

    def trace(self, *args: Any) -> Any:
        """What it is in a graph."""
        return None


def is_off() -> bool:
    """Whether taps are off for good. torch.compile takes the answer while it traces: a graph that it has made stays,
    with taps that do nothing."""
    return undone()


def _nothing() -> Any:
    return functools.partial(sys.audit, "flexmodel.copied")


class _Before(Traced):
    def trace(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        found = _Found()
        found.walk(args, "in", 0)
        found.walk(kwargs, "in", 0)
        flags = _PRE | _flags(module)
        call = _tap(self.number, found.leaves, found.paths, found.first(), flags, [])
        if self.edits & _OF_INPUTS:
            found.edit(call, _OF_INPUTS)
            args, kwargs = found.rebuilt(args, "in", 0), found.rebuilt(kwargs, "in", 0)
        if self.kinds & _OF_INPUT_GRADIENTS and flags & _GRADIENTS:
            _watch_inputs(call, self.kinds, self.edits, found.paths, found.leaves)
        return (args, kwargs) if self.edits & _OF_INPUTS else None


class _After(Traced):
    takes = 4

    def trace(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        given = _Found()
        given.walk(args, "in", 0)
        given.walk(kwargs, "in", 0)
        found = _Found()
        found.walk(output, "out", 0)
        flags = _flags(module)
        watched = given.differentiable() if self.kinds & _OF_INPUT_GRADIENTS and flags & _GRADIENTS else []
        call = _tap(self.number, found.leaves, found.paths, given.first(), flags | self.flags, watched)
        changed = False
        if self.edits & _OF_OUTPUTS:
            found.edit(call, _OF_OUTPUTS)
            changed = True
        if self.kinds & _OF_GRADIENTS and flags & _GRADIENTS:
            now = _watch_outputs(call, self.kinds, self.edits, found.paths, found.leaves)
            if self.edits & _OF_GRADIENTS:
                found.leaves = list(now)
                changed = True
        return found.rebuilt(output, "out", 0) if changed else None


class _Enter(Traced):
    def trace(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        found = _Found()
        found.walk(args, "in", 0)
        found.walk(kwargs, "in", 0)
        flags = _PRE | _flags(module)
        if flags & _GRADIENTS and not flags & _TRAINING and any(each.training for each in module.modules()):
            flags |= _TRAINING
        _forward_pass(self.number, found.first(), flags)
        return None


class _Leave(Traced):
    takes = 4

    def trace(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        _forward_pass(self.number, None, _flags(module))
        return None


_ROLES = {"before": _Before, "after": _After, "enter": _Enter, "leave": _Leave}


def traced(hook: Any, module: nn.Module) -> Any:
    """A module's hook, so that torch.compile can trace it; one that is no C callable does nothing then."""
    if not hasattr(hook, "traced"):
        return hooks.Traceable(hook)
    role, number, kinds, edits = hook.traced()
    return _ROLES[role](hook, number, kinds, edits, 0 if stored(module) else _KEEPS)


def _flags(module: nn.Module) -> int:
    return (_GRADIENTS if torch.is_grad_enabled() else 0) | (_TRAINING if module.training else 0)


# What torch.compile has in its graphs. Nothing of ours may reach the job.
def _tap(
    number: torch.Tensor,
    leaves: list[torch.Tensor],
    paths: list[str],
    first: torch.Tensor | None,
    flags: int,
    watched: list[str],
) -> torch.Tensor:
    try:
        # Paths of inputs whose gradients would have to be watched since the module was called.
        split = watched if watched and _bridge.is_split() else []
        like = first if flags & _KEEPS else None
        parts = [_part(leaf, like) for leaf in leaves]
        locals_, layouts, refusals = ([part[n] for part in parts] for n in range(3))
        with _once():
            return torch.ops.flexmodel.tap(
                number, locals_, paths, layouts, refusals, _batch(first), flags & ~_KEEPS, split
            )
    except Exception as e:
        _bridge.fault(f"a tap could not be put into a graph: {type(e).__name__}: {e}")
        return torch.zeros(_bridge.call_words + len(leaves), dtype=torch.int64)


def _forward_pass(number: torch.Tensor, first: torch.Tensor | None, flags: int) -> None:
    try:
        with _once():
            torch.ops.flexmodel.forward_pass(number, _batch(first), flags)
    except Exception as e:
        _bridge.fault(f"a forward pass could not be put into a graph: {type(e).__name__}: {e}")


def _batch(first: torch.Tensor | None) -> torch.Tensor | None:
    part = None if first is None else _part(first, None)
    return part[0] if part is not None and part[2] == _READABLE else None


def _part(leaf: torch.Tensor, like: torch.Tensor | None) -> tuple[torch.Tensor, str, int]:
    """What a graph can have of a leaf, how that lies, and why it cannot be had."""
    return _part_if_any(leaf, like) or (torch.empty(0), "", _RAISED)


@contextlib.contextmanager
def _once() -> Iterator[None]:
    """What is put into a graph here is not computed anew in its backward, whatever activation checkpointing wants."""
    meta = torch.fx.traceback.get_current_meta()
    kept = {name: meta.pop(name) for name in ("recompute", "ac_graph_id") if name in meta}
    try:
        yield
    finally:
        meta.update(kept)


def _edit(call: torch.Tensor, kinds: int, path: str, leaf: torch.Tensor) -> torch.Tensor:
    try:
        edited = _Edited.apply(leaf, torch.ops.flexmodel.factors(call, kinds, path))
        _part_if_any(edited, leaf)  # it lies as the leaf does
        return edited
    except Exception as e:
        _bridge.fault(f"an edit could not be put into a graph: {type(e).__name__}: {e}")
        return leaf


class _Edited(torch.autograd.Function):
    """`_edited`, differentiably, and without a word to what a tensor may be made of."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(factors)
        return _edited(tensor, factors)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return _edited(gradients[0], *ctx.saved_tensors), None


def _edited(tensor: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """As `edited` in `cxx-bridge/cpp/gradients.cc`, whatever this call's edit is. Of a DTensor the local one, which
    communicates nothing, and is right for addends too."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, context = tensor.__tensor_flatten__()
        parts = {name: getattr(tensor, name) for name in names}
        parts |= {name: _edited(part, factors) for name, part in parts.items() if isinstance(part, torch.Tensor)}
        return type(tensor).__tensor_unflatten__(parts, context, tensor.size(), tensor.stride())  # type: ignore[attr-defined]
    now = tensor * factors[0] if tensor.is_floating_point() or tensor.is_complex() else tensor
    return torch.where(factors[1].to(tensor.device) != 0, torch.zeros_like(now), now)


def _watch_inputs(call: torch.Tensor, kinds: int, edits: int, paths: list[str], leaves: list[torch.Tensor]) -> None:
    try:
        _bridge.watch_inputs(call, kinds, edits, paths, leaves)
    except Exception as e:
        _bridge.fault(f"gradients could not be watched in a graph: {type(e).__name__}: {e}")


def _watch_outputs(call: torch.Tensor, kinds: int, edits: int, paths: list[str], leaves: list[torch.Tensor]) -> Any:
    """What is returned instead of `leaves` where gradients may be edited: the graph relies on getting as many."""
    now = leaves
    try:
        now = _bridge.watch_outputs(call, kinds, edits, paths, leaves)
    except Exception as e:
        _bridge.fault(f"gradients could not be watched in a graph: {type(e).__name__}: {e}")
    return tuple(now) if edits & _OF_GRADIENTS else None


class _Found:
    """The tensors in what a module takes or returns, with the paths that `cxx-bridge/cpp/leaves.cc` gives them."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.leaves: list[torch.Tensor] = []
        self.at = 0

    def walk(self, value: Any, path: str, depth: int) -> None:
        if isinstance(value, torch.Tensor):
            self.paths.append(path)
            self.leaves.append(value)
        elif depth < _MAX_DEPTH:
            for key, item in _items(value):
                self.walk(item, path + key, depth + 1)

    def first(self) -> torch.Tensor | None:
        """As `first_tensor` in `cxx-bridge/cpp/leaves.cc`."""
        for leaf in self.leaves:
            if leaf.dim() > 0:
                return leaf
        return None

    def differentiable(self) -> list[str]:
        """Paths of what a gradient is computed of."""
        return [path for path, leaf in zip(self.paths, self.leaves, strict=True) if leaf.requires_grad]

    def edit(self, call: torch.Tensor, kinds: int) -> None:
        """Replaces what was found by what the edits of a call make of it."""
        self.leaves = [_edit(call, kinds, path, leaf) for path, leaf in zip(self.paths, self.leaves, strict=True)]

    def rebuilt(self, value: Any, path: str, depth: int) -> Any:
        """`value` with the tensors of `leaves` in it, in the order in which they were found."""
        if isinstance(value, torch.Tensor):
            self.at += 1
            return self.leaves[self.at - 1]
        if depth >= _MAX_DEPTH:
            return value
        items = [(key, self.rebuilt(item, path + key, depth + 1)) for key, item in _items(value)]
        if isinstance(value, tuple):
            parts = [item for _, item in items]
            return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
        if type(value) is list:
            return [item for _, item in items]
        if type(value) is dict:
            return dict(zip(value.keys(), [item for _, item in items], strict=True))
        if isinstance(value, dict):
            for key, (_, item) in zip(list(value.keys()), items, strict=True):
                value[key] = item
        elif items:
            for key, item in items:
                object.__setattr__(value, key[1:], item)
        return value


def _items(value: Any) -> list[tuple[str, Any]]:
    """What a container holds, and the steps to it; nothing for what is none."""
    if isinstance(value, tuple):
        if hasattr(value, "_fields"):
            return [("." + name, getattr(value, name)) for name in value._fields]
        return [(f"[{i}]", item) for i, item in enumerate(value)]
    if isinstance(value, list):
        return [(f"[{i}]", item) for i, item in enumerate(value)]
    if isinstance(value, dict):
        return [("." + key if isinstance(key, str) else f"[{key}]", item) for key, item in value.items()]
    if value is None or isinstance(value, (int, float, str)):
        return []
    names = field_names(type(value))
    return [("." + name, getattr(value, name, None)) for name in names.split(",")] if names else []


def field_names(cls: type) -> str:
    """The fields of a dataclass, if it is one. torch.compile takes the answer, and does not read this: it knows few of
    the classes that there are."""
    return ",".join(field.name for field in dataclasses.fields(cls)) if dataclasses.is_dataclass(cls) else ""
