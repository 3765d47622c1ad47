"""A parameter, module or tensor that raises when we look at it is left out, and nothing else is.

Code that goes through many of them looks at each by `Faults.of`, or by a function that `Faults.guard` made: what raises
is reported by its name, once, with the reason, and the others go on.
"""

from __future__ import annotations

import functools
import signal
from collections.abc import Callable
from typing import Any

# Faults that are reported one by one.
_REPORTED = 20
# Characters of a reason that are reported.
_LONGEST = 300
# What ends a process.
_ENDING = (KeyboardInterrupt, SystemExit)


class Faults:
    """Reports every fault once."""

    def __init__(self, bridge: Any) -> None:
        self._bridge = bridge
        self._reported: set[tuple[str, str]] = set()
        bridge.faults_with(reason, self.report)

    def of(self, name: str, function: Callable[..., Any], *args: Any, otherwise: Any = None) -> Any:
        """What `function` returns, or `otherwise` if it raises; `name` tells the user what it was about."""
        try:
            return function(*args)
        except BaseException as e:
            why = reason(e)
            if why is None:
                raise
            self.report(name, why)
            return otherwise

    def guard(self, function: Callable[..., Any], name: str = "") -> Callable[..., Any]:
        """A function that does the same, takes positional arguments alone, and gives None where it would raise."""
        name = name or getattr(function, "__qualname__", repr(function))

        @functools.wraps(function)
        def call(*args: Any) -> Any:
            return self.of(name, function, *args)

        return call

    def report(self, name: str, why: str) -> None:
        """Something is not captured, or not as it could be."""
        if (name, why) in self._reported or len(self._reported) > _REPORTED:
            return
        self._reported.add((name, why))
        more = len(self._reported) > _REPORTED
        self._bridge.notice("further faults like these are not reported" if more else f"{name}: {why}")


def reason(e: BaseException) -> str | None:
    """Why something failed, in a line. None if the exception is the job's: what ends the process, and what a handler of
    its signals raised, which may have run while our code did."""
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
    """The code of a signal handler; None if that is not Python."""
    while isinstance(handler, functools.partial):
        handler = handler.func
    function = getattr(handler, "__func__", handler)
    return getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
