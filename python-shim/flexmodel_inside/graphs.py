"""Has torch.compile make those graphs anew whose modules get other hooks, and says whether the job forbids that.

By default torch.compile has no guard on a module without hooks (`torch._dynamo.config.skip_nnmodule_hook_guards`): a
graph that it has made stays as it is when the module gets a hook. Where it has a guard, each further graph counts
towards the limit after which it compiles no more. So what it made of the code in question is forgotten, and its next
call compiles it as the first call did: that is no recompilation to it.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from .naming import held_by
from .patches import follow, given

# What a job sets where nothing may be compiled any more, and what compiling would do there.
_FORBIDDING = ("fail_on_recompile", "eager_on_recompile")


class Graphs:
    """What torch.compile has made graphs of in this process, by the code with which they begin.

    `tell` is called with why they must not be made anew, whenever that changes; with nothing where they may.
    """

    def __init__(self, tell: Callable[[str], object]) -> None:
        self._tell = tell
        self._told = ""
        # What else is in the graphs of a code, by ids, since code compares by value. None where torch does not say.
        self._inside: dict[int, tuple[weakref.ref[types.CodeType], set[int] | None]] = {}
        # Why nothing was to be compiled at some time of this step, and of the one before.
        self._in_this_step = ""
        self._in_last_step = ""

    def watch(self, guard: Callable[..., Any]) -> None:
        """Follow what is compiled. `guard` makes of a function one that raises nothing."""
        from torch._dynamo import decorators, guards

        def made(_: Any, args: tuple, kwargs: dict) -> None:
            tracing = getattr(given(args, kwargs, 2, "output_graph"), "tracing_context", None)
            self._made(given(args, kwargs, 1, "f_code"), getattr(tracing, "traced_code", None))

        follow(guards.CheckFunctionManager, "__init__", guard, after=made)
        if hasattr(decorators, "_set_stance"):
            follow(decorators, "_set_stance", guard, after=lambda *_: self._stance_set())
            self._stance_set()

    def _made(self, code: types.CodeType, inside: Iterable[types.CodeType] | None) -> None:
        ref, before = self._inside.get(id(code), (None, None))
        found = None if inside is None else set(map(id, inside))
        if ref is not None and ref() is code and found is not None and before is not None:
            found |= before
        self._inside[id(code)] = (weakref.ref(code), found)
        self._tell_if_new()

    def _stance_set(self) -> None:
        self._in_this_step = _reason() or self._in_this_step
        self._tell_if_new()

    def step_ended(self) -> None:
        """A step of the job ended. What a job sets for a part of each step, it sets again in the next one."""
        self._in_last_step, self._in_this_step = self._in_this_step, _reason()
        self._tell_if_new()

    def _tell_if_new(self) -> None:
        why = self.forbidden() if self._inside else ""
        if why != self._told:
            self._told = why
            self._tell(why)

    def forbidden(self) -> str:
        """Why nothing may be compiled, now or in another part of a step; empty if it may. Any thread may ask."""
        return _reason() or self._in_this_step or self._in_last_step

    def inside(self, modules: Iterable[nn.Module]) -> set[int]:
        """The ids of those of all `modules` that may be in a graph, as far as their classes tell: these, and what they
        hold."""
        every, codes = list(modules), set()
        for ref, inside in list(self._inside.values()):
            if ref() is not None and inside is None:
                return set(map(id, every))
            codes |= inside or set() if ref() is not None else set()
        stack = [module for module in every if id(_forward_of(module)) in codes]
        found = set(map(id, stack))
        while stack:
            for _, child in held_by(stack.pop()):
                if id(child) not in found:
                    found.add(id(child))
                    stack.append(child)
        return found

    def having(self, modules: Iterable[nn.Module]) -> list[types.CodeType]:
        """The code whose graphs may have one of these modules in them, as far as their classes tell. What holds them is
        to be among these: a module of torch's may be in a graph without its code."""
        forwards = {id(code) for module in modules if (code := _forward_of(module)) is not None}
        each = [(ref(), inside) for ref, inside in list(self._inside.values())]
        return [code for code, inside in each if code and (inside is None or not inside.isdisjoint(forwards))]

    def forget(self, codes: Iterable[types.CodeType]) -> bool:
        """Has the next call of each compiled anew. False where something is being compiled just now: then nothing is
        forgotten, since whoever compiles writes to what would be."""
        from torch._dynamo import convert_frame, eval_frame

        lock = convert_frame.compile_lock
        if torch._guards.CompileContext.try_get() is not None or not lock.acquire(blocking=False):
            return False
        try:
            for code in codes:
                eval_frame.reset_code(code)
                self._inside.pop(id(code), None)
        finally:
            lock.release()
        return True


def _reason() -> str:
    stance = getattr(torch._dynamo.eval_frame, "_stance", None)
    if stance is None:
        return ""
    if stance.stance in _FORBIDDING:
        return f'torch.compiler.set_stance("{stance.stance}") is in force'
    if getattr(stance, "skip_guard_eval_unsafe", False):
        return "torch.compiler.set_stance(skip_guard_eval_unsafe=True) is in force"
    return ""


def _forward_of(module: nn.Module) -> types.CodeType | None:
    forward = getattr(type(module), "forward", None)
    return getattr(forward, "__code__", None)
