"""Puts taps on modules, and keeps them such that torch.compile can trace them."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Set
from typing import Any

import torch
from torch import nn

from . import compiled, compiler, guarded, hooks, patches, uniform_hooks
from .caches import Caches
from .faults import Faults
from .module_registry import ModuleRegistry
from .naming import holders, is_called_in_parts, own


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
        """Taps the `selected` of a model's modules, given by index. `called` is what the job calls now, if that is
        known; `models` are the serials of all models."""
        inside = [module for _, module in modules]
        marking = [model]
        if is_called_in_parts(inside, model if called is None else called):
            marking += holders(inside, [inside[index] for index, _ in selected])
        for module in marking:
            known = self._registry.member(module)
            if serial not in known.marks:
                known.marks.add(serial)
                begin, end = self._bridge.pass_hooks(serial, 0 if module is model else known.serial + 1)
                key = compiled.PASS_KEY - len(known.marks)
                self._hook(module, "_forward_pre_hooks", key, begin)
                self._hook(module, "_forward_hooks", key, end, always_call=self._traceable is None)
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
        if before is not None:
            self._hook(module, "_forward_pre_hooks", compiled.TAP_KEY, before)
        self._hook(module, "_forward_hooks", compiled.TAP_KEY, after)
        known.tapped = (serial, name)

    def _hook(self, module: nn.Module, kind: str, key: int, hook: Any, always_call: bool = False) -> None:
        hooks.drop_strays(module)  # of a class with a `__setstate__` of its own
        hooks.put(module, kind, key, self._dressed(hook, module), always_call)
        self._registry.member(module).hooks.append((kind, key))

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

    def _make_uniform(self) -> None:
        if self._has_new:
            self._has_new = False
            modules = self._registry.modules()
            for module in modules:
                hooks.drop_strays(module)
            uniform_hooks.pad(modules)
