"""Puts taps on modules, and keeps them such that torch.compile can trace them."""

from __future__ import annotations

import functools
import threading
import types
from collections.abc import Callable, Set
from typing import Any

import torch
from torch import nn

from . import compiled, compiler, guarded, hooks, patches, uniform_hooks
from .caches import Caches
from .faults import Faults
from .graphs import Graphs
from .module_registry import Member, ModuleRegistry
from .naming import authored, holders, is_called_in_parts, own


def part_of(member: Member) -> int:
    """The number of a module as a part of any model that it is in; 0 is the model itself."""
    return member.serial + 1


class Tapping:
    """The taps of this process."""

    def __init__(self, bridge: Any, faults: Faults, registry: ModuleRegistry) -> None:
        self._bridge = bridge
        self._faults = faults
        self._registry = registry
        # What makes a hook traceable, once torch.compile may trace it.
        self._traceable: Any = None
        # Whether hooks have come since modules that share a graph were made uniform.
        self._has_new = False
        # What torch.compile has made graphs of, from then on.
        self._graphs: Graphs | None = None
        # Other hooks are in force, and graphs may lack them: those with modules that have more to do now, and others by
        # their code. The ids of modules in graphs that must stay as they are, and which of them lack hooks.
        self._revises = False
        self._changed: list[nn.Module] = []
        self._stale: dict[int, types.CodeType] = {}
        self._fixed: set[int] = set()
        self._lacking: set[int] = set()
        # What keeps our graphs out of caches, once torch.compile is in use and knows our operations.
        self.caches: Caches | None = None

    def put(
        self,
        serial: int,
        model: nn.Module,
        modules: list[tuple[str, nn.Module]],
        selected: list[tuple[int, Any]],
        called: nn.Module | None,
        models: Set[int],
    ) -> None:
        """Marks the passes of a model, and taps the `selected` of its modules, given by index. `called` is what the job
        calls now, if that is known; `models` are the serials of all models."""
        inside = [module for _, module in modules]
        marking = [model]
        first = [module for module in inside if serial in self._registry.member(module).begins]
        in_parts = bool(first) or is_called_in_parts(inside, model if called is None else called)
        if in_parts and not first:
            first = [module for module in inside[1:] if called is not None and module is authored(called)]
        for module in first:
            known = self._registry.member(module)
            known.begins.add(serial)
            self._bridge.first_part(serial, part_of(known))
        if in_parts:
            chosen = [inside[index] for index, _ in selected]
            # Where nothing is selected, what was called first tells the passes.
            marking += [*holders(inside, chosen), *chosen] or first
        for module in marking:
            known = self._registry.member(module)
            if serial not in known.marks:
                known.marks.add(serial)
                begin, end = self._bridge.pass_hooks(serial, 0 if module is model else part_of(known))
                key = compiled.PASS_KEY - len(known.marks)
                self._hook(module, key, begin, end, always_call=self._traceable is None)
        for index, (before, after) in selected:
            name, module = modules[index]
            self._faults.of(name or "the model", self._tap_module, name, module, before, after, serial, models)
        self._has_new = True

    def _tap_module(self, name: str, module: nn.Module, before: Any, after: Any, serial: int, models: Set[int]) -> None:
        known = self._registry.member(module)
        if known.tapped is not None:
            owner, _ = known.tapped
            # What two models share is tapped in the first. What was a model before it became part of one moves.
            if known.tapped == (serial, name) or (owner != serial and owner in models):
                return
            self._untap(module)
        self._hook(module, compiled.TAP_KEY, before, after)
        known.tapped, known.tap = (serial, name), after.tap

    def _hook(self, module: nn.Module, key: int, before: Any, after: Any, always_call: bool = False) -> None:
        """Puts both hooks on a module at once: in a graph one counts on the other. `before` may be None."""
        hooks.drop_strays(module)  # of a class with a `__setstate__` of its own
        each = [("_forward_pre_hooks", before), ("_forward_hooks", after)]
        new = [(kind, self._dressed(hook, module)) for kind, hook in each if hook is not None]
        there = {kind: own(module, kind, {}).get(key) for kind, _ in new}
        traced = [isinstance(there[kind], compiled.Traced) and there[kind].covers(hook) for kind, hook in new]
        if id(module) in self._fixed and not all(traced):
            self._lacking.add(id(module))
            return
        known = self._registry.member(module)
        for kind, hook in new:
            if type(there[kind]) is type(hook) and isinstance(hook, compiled.Traced):
                there[kind].take(hook)
            else:
                hooks.put(module, kind, key, hook, always_call and kind == "_forward_hooks")
            if (kind, key) not in known.hooks:
                known.hooks.append((kind, key))
        if self._revises and not all(traced):
            self._changed.append(module)

    def _dressed(self, hook: Any, module: nn.Module) -> Any:
        bind = getattr(hook, "bind", None)
        if bind is not None:
            bind(module)
        return hook if self._traceable is None else self._traceable(hook, module)

    def _untap(self, module: nn.Module) -> None:
        known = self._registry.member(module)
        for kind, key in known.hooks:
            if key == compiled.TAP_KEY:
                hooks.drop(module, kind, key)
        known.hooks = [hook for hook in known.hooks if hook[1] != compiled.TAP_KEY]

    def begin_revision(self) -> None:
        """Takes all taps off: other hooks are in force. What is in a graph of torch.compile's stays, and does
        nothing."""
        graphs = self._graphs
        inside = set() if graphs is None else graphs.inside(self._registry.modules())
        self._revises = graphs is not None
        self._fixed = inside if graphs is not None and graphs.forbidden() else set()
        for member in self._registry.members():
            module, kept = member.module(), []
            for kind, key in member.hooks if module is not None else ():
                hook = own(module, kind, {}).get(key)
                if id(module) in inside and isinstance(hook, compiled.Traced):
                    hook.release()
                    kept.append((kind, key))
                else:
                    hooks.drop(module, kind, key)
            member.hooks, member.tapped, member.tap = kept, None, -1
            member.marks.clear()

    def renew_graphs(self) -> bool:
        """Has graphs made anew that lack hooks of the revision in force, once all are put. False where that has to
        wait, since torch.compile is making others: to be asked again."""
        graphs = self._graphs
        if graphs is not None and self._revises:
            self._revises = False
            self._outdate(graphs)
        if graphs is None or not self._stale:
            return True
        if not graphs.forget(self._stale.values()):
            return False
        count, revision = len(self._stale), self._bridge.revision()
        self._stale.clear()
        functions = "1 compiled function is" if count == 1 else f"{count} compiled functions are"
        self._bridge.notice(f"{functions} compiled again for revision {revision} of the hooks")
        return True

    def _outdate(self, graphs: Graphs) -> None:
        modules, changed = self._registry.modules(), self._changed
        self._changed = []
        if graphs.inside(modules):
            changed = changed + self._make_uniform()
        self._stale |= {id(code): code for code in graphs.having([*changed, *holders(modules, changed)])}
        if self._lacking:
            revision, why, count = self._bridge.revision(), graphs.forbidden(), len(self._lacking)
            lacking = "1 compiled module is" if count == 1 else f"{count} compiled modules are"
            self._bridge.notice(
                f"revision {revision} of the hooks: {lacking} not captured, since nothing may be compiled again: {why}"
            )
        self._fixed, self._lacking = set(), set()

    def undo_if_off(self) -> bool:
        """The engine switches taps off by itself too. Whether what we replaced is undone."""
        # Not while torch.compile makes a graph: what it does wrong with our operations is mended until that is made.
        if not self._bridge.active() and self._registry.ignored_thread is None:
            patches.undo()
        return patches.undone()

    def compiler_is_here(self, settle: Callable[[], object]) -> None:
        """torch.compile is in use: every hook has to be something that it can trace. `settle` looks at all models that
        were not looked at."""
        if self._traceable is not None:
            return
        try:
            compiler.ready(self._bridge, self._faults.guard)
            self._traceable = compiled.traced
        except Exception as e:
            self._traceable = hooks.Traceable
            why = f"{type(e).__name__}: {e}"
            self._bridge.notice(f"modules inside torch.compile are not captured with this torch: {why}")
        for member in self._registry.members():
            module = member.module()
            for kind, key in member.hooks if module is not None else ():
                there = own(module, kind, {})
                if there.get(key) is not None:
                    there[key] = self._dressed(there[key], module)
                    own(module, "_forward_hooks_always_called", {}).pop(key, None)
        if self._traceable is compiled.traced:
            self._follow_compiler(settle)

    def _follow_compiler(self, settle: Callable[[], object]) -> None:
        """Have our hooks in place before torch.compile traces anything, also a function that calls models."""

        def settled() -> None:
            if not patches.undone():
                settle()
                self._make_uniform()

        def begin(*_: Any) -> None:
            settled()
            # The compiler makes modules of its own.
            self._registry.ignored_thread = threading.get_ident()

        def end(*_: Any) -> None:
            self._registry.ignored_thread = None
            self.undo_if_off()

        handler = torch._dynamo.callback.callback_handler
        begins, ends = guarded(self._bridge, begin), guarded(self._bridge, end)

        def register(*_: Any) -> None:
            handler.register_start_callback(begins)
            handler.register_end_callback(ends)

        patches.follow(handler, "clear", self._faults.guard, after=register)
        register()
        guard = functools.partial(guarded, self._bridge)
        self.caches = Caches(self._bridge, settled, self._registry.modules, guard)
        self.caches.watch()
        self._graphs = Graphs(self._bridge.forbid_compiling)
        self._graphs.watch(self._faults.guard)

    def step_ended(self) -> None:
        """A step of the job ended."""
        if self._graphs is not None:
            self._graphs.step_ended()
        self.undo_if_off()

    def _make_uniform(self) -> list[nn.Module]:
        """Which modules have more in a graph now."""
        if not self._has_new:
            return []
        self._has_new = False
        modules = self._registry.modules()
        for module in modules:
            hooks.drop_strays(module)
        return uniform_hooks.pad(modules, lambda module: id(module) not in self._fixed)
