"""What one parameter, module or tensor costs that raises when it is looked at: itself, and nothing else.

Whoever goes through many of them has each looked at by `Faults.of`, or by a function that `Faults.guard` made: what
raises is told by its name, once, with the reason, and the others go on.
"""

from __future__ import annotations

import functools
import signal
from collections.abc import Callable
from typing import Any

# Faults that are told one by one.
_TOLD_EACH = 20
# Characters of a reason that are told.
_LONGEST = 300
# What ends a process.
_ENDING = (KeyboardInterrupt, SystemExit)


class Faults:
    """Tells every fault once."""

    def __init__(self, bridge: Any) -> None:
        self._bridge = bridge
        self._told: set[tuple[str, str]] = set()
        bridge.faults_with(reason, self.tell)

    def of(self, name: str, function: Callable[..., Any], *args: Any, otherwise: Any = None) -> Any:
        """What `function` returns, or `otherwise` if it raises; then `name` says to the user what that was about."""
        try:
            return function(*args)
        except BaseException as e:
            why = reason(e)
            if why is None:
                raise
            self.tell(name, why)
            return otherwise

    def guard(self, function: Callable[..., Any], name: str = "") -> Callable[..., Any]:
        """`function`, which takes positional arguments, so that it gives None where it raises."""
        name = name or getattr(function, "__qualname__", repr(function))

        @functools.wraps(function)
        def call(*args: Any) -> Any:
            return self.of(name, function, *args)

        return call

    def tell(self, name: str, why: str) -> None:
        """Says that something is not captured, or not as it could be."""
        if (name, why) in self._told or len(self._told) > _TOLD_EACH:
            return
        self._told.add((name, why))
        more = len(self._told) > _TOLD_EACH
        self._bridge.notice("more has raised like that, and is not told of" if more else f"{name}: {why}")


def reason(e: BaseException) -> str | None:
    """Why something failed, in a line; None if it did not, and the exception is the job's: what ends the process, and
    whatever a handler of its signals raised, which may have come while our code ran."""
    if isinstance(e, _ENDING) or _is_of_a_signal(e):
        return None
    try:
        text = " ".join(str(e).split())
    except BaseException as worse:
        if isinstance(worse, _ENDING):
            raise
        text = ""
    return f"{type(e).__name__}: {text}"[:_LONGEST] if text else type(e).__name__


def _is_of_a_signal(e: BaseException) -> bool:
    handlers = map(signal.getsignal, signal.valid_signals())
    codes = [code for each in handlers if callable(each) and (code := _code_of(each)) is not None]
    trace = e.__traceback__
    while trace is not None:
        if any(code is trace.tb_frame.f_code for code in codes):
            return True
        trace = trace.tb_next
    return False


def _code_of(handler: Any) -> Any:
    """What runs where a signal is handled; None if that is not Python."""
    while isinstance(handler, functools.partial):
        handler = handler.func
    function = getattr(handler, "__func__", handler)
    return getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
