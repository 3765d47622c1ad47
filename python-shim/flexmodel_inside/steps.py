"""The closure of an optimizer's step, which computes the gradients that the step uses.

It is the argument for the parameter `closure`, if that is callable. A step that takes any arguments and hands them on
has it where torch's optimizers have it, first. Nothing else is a closure, even if the step calls it.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

from .naming import is_module

_NAME = "closure"
# On a function that stands in for a closure, and on what the job made of that with `functools.wraps`.
_MARK = "_flexmodel_stands_in"


def has_stand_in(args: tuple, kwargs: dict) -> bool:
    """Whether a step is given a closure that has one already: by an optimizer that hands it to another."""
    return any(isinstance(v, types.FunctionType) and _MARK in vars(v) for v in (*args, *kwargs.values()))


def with_stand_in(step: Any, args: tuple, kwargs: dict, then: Callable[[], object]) -> tuple[tuple, dict] | None:
    """What to give to `step` in place of `args`, which begin with the optimizer, and `kwargs`: `then`, which raises
    nothing, is called after each call of the closure. None if there is no closure."""
    if _is_closure(kwargs.get(_NAME)):
        return args, {**kwargs, _NAME: _stand_in(kwargs[_NAME], then)}
    at = _place(step) if any(map(_is_closure, args[1:])) else None
    if at is None or at >= len(args) or not _is_closure(args[at]):
        return None
    return (*args[:at], _stand_in(args[at], then), *args[at + 1 :]), kwargs


def _is_closure(value: object) -> bool:
    return callable(value) and not is_module(value)


def _place(step: Any) -> int | None:
    """Where the closure is among the positional arguments of a step."""
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(step).parameters.values()
    names = [parameter.name for parameter in parameters if parameter.kind in by_position]
    if _NAME in names:
        return names.index(_NAME)
    takes_any = any(parameter.kind is inspect.Parameter.VAR_POSITIONAL for parameter in parameters)
    return 1 if takes_any and len(names) < 2 else None


def _stand_in(closure: Any, then: Callable[[], object]) -> Any:
    @functools.wraps(closure)
    def stand_in(*args: Any, **kwargs: Any) -> Any:
        result = closure(*args, **kwargs)
        then()
        return result

    setattr(stand_in, _MARK, True)
    return stand_in
