"""Parameters whose elements are codes: packed or quantized, with what they stand for kept beside them.

Such a parameter says nothing of it in a way that all libraries share. But codes are integers or of one byte, and mean
nothing by themselves: so an integer parameter is taken for what it is only where nothing is there that it could be read
with, other than parameters, which are captured like it. bitsandbytes alone packs into elements of any type, and has a
name for what is beside them. Tensors of classes that answer for all operations themselves (torchao's) are refused by
the bridge, which sees that they have no elements of their own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .naming import own, stored

# bitsandbytes: how a weight was quantized; at the weight, and at the layer.
_QUANT_STATE = "quant_state"
# What every module has.
_USUAL = frozenset(vars(nn.Module()))
# How deep tensors are looked for in what a module or a parameter has, and in how many things.
_DEEP, _MANY = 2, 256


def is_packed(module: nn.Module, key: str, local: torch.Tensor) -> bool:
    """Whether the elements of a module's parameter are codes; `local` is what this process has of it."""
    parameter = stored(module).get(key)
    beside = {} if parameter is None else _attributes(parameter)
    if beside.get(_QUANT_STATE) is not None or own(module, _QUANT_STATE, None) is not None:
        return True
    if local.dtype is torch.bool or local.dtype.is_complex or (local.is_floating_point() and local.element_size() > 1):
        return False
    if parameter is not None and not str(type(parameter).__module__).startswith("torch."):
        return True
    others = {name: value for name, value in _attributes(module).items() if name not in _USUAL}
    return _has_tensors([beside, own(module, "_buffers", {}), others], _DEEP)


def _attributes(value: Any) -> dict[str, Any]:
    """What was set on an object itself."""
    try:
        found = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return {}
    return found if type(found) is dict else {}


def _has_tensors(values: list[Any], deep: int) -> bool:
    for value in values[:_MANY]:
        if issubclass(type(value), torch.Tensor):
            return True
        if deep < 0:
            continue
        if type(value) in (list, tuple):
            inside = list(value)
        elif issubclass(type(value), nn.Module) or isinstance(value, type):
            inside = []
        else:
            inside = list((value if type(value) is dict else _attributes(value)).values())
        if _has_tensors(inside, deep - 1):
            return True
    return False
