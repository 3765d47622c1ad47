"""Functions of torch's, and of what is built on it, that have ours in their place.

What stands in calls the original with whatever it is given, and gives back, or raises, what that does. It looks like
the original too: its name, its documentation and its signature are those.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def follow(
    owner: Any,
    name: str,
    guard: Callable[..., Any],
    before: Callable[[tuple, dict], object] | None = None,
    after: Callable[[Any, tuple, dict], object] | None = None,
) -> None:
    """Have `before` called with what a function is given, positional and by keyword, and `after` with what it returned
    and that. `guard` makes of each what raises nothing, and tells by a name of what did."""
    original = getattr(owner, name)
    what = f"following {getattr(original, '__qualname__', name)}"
    begin, end = (None if told is None else guard(told, what) for told in (before, after))

    @functools.wraps(original)
    def stand_in(*args: Any, **kwargs: Any) -> Any:
        if begin is not None:
            begin(args, kwargs)
        result = original(*args, **kwargs)
        if end is not None:
            end(result, args, kwargs)
        return result

    setattr(owner, name, stand_in)


def given(args: tuple, kwargs: dict, index: int, name: str, otherwise: Any = None) -> Any:
    """An argument, whichever way it came."""
    return args[index] if len(args) > index else kwargs.get(name, otherwise)
