"""Every module, known from construction on, so that the tops of all can be told at any time."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from . import hooks
from .naming import held_by, is_module, own
from .patches import follow, given, undone


class Member:
    """What is known of a module; it goes when the module goes."""

    __slots__ = ("hooks", "model", "module", "scoped", "serial", "tapped")

    def __init__(self, module: weakref.ref[nn.Module], serial: int) -> None:
        self.module = module
        # A number of its own, in the order in which modules were met.
        self.serial = serial
        # Whether it is a model with taps.
        self.model = False
        # The serials of models in which it is a scope, and the model and the name that its tap is for.
        self.scoped: set[int] = set()
        self.tapped: tuple[int, str] | None = None
        # Hooks of ours: the attribute of the module, and the key.
        self.hooks: list[tuple[str, int]] = []


class Family:
    """Every live module. Keyed by identity: modules may define `__eq__`."""

    def __init__(
        self, guard: Callable[..., Any], on_change: Callable[[], None], on_gone: Callable[[int], None]
    ) -> None:
        # Makes of a function one that raises nothing.
        self._guard = guard
        self._members: dict[int, Member] = {}
        self._serials = itertools.count()
        # Those met since `tops` told all, while nothing else has changed; None if something has.
        self._fresh: dict[int, Member] | None = None
        # The thread whose modules are not the job's.
        self.deaf: int | None = None
        self._on_change = on_change
        # Told the serial of a model that is no more.
        self._on_gone = on_gone

    def watch(self) -> None:
        """Follow every registration, and every copy, which registers nothing.

        A module with neither children, parameters nor buffers is met in its parent, or when it is called.
        """
        registry, guard = nn.modules.module, self._guard
        registry.register_module_module_registration_hook(guard(self._registered))
        registry.register_module_parameter_registration_hook(guard(self._has))
        registry.register_module_buffer_registration_hook(guard(self._has))
        follow(nn.Module, "__setstate__", guard, after=lambda _, *call: self._restored(given(*call, 0, "self")))

    def _registered(self, parent: nn.Module, name: str, child: nn.Module | None) -> None:
        if is_module(child) and not self._is_deaf():
            self.member(parent)
            self.member(child)
            self.changed()

    def _has(self, module: nn.Module, name: str, value: Any) -> None:
        # Also called when one is assigned anew, which some modules do in every forward.
        if not self._is_deaf() and id(module) not in self._members:
            self._meet(module)
            self._on_change()

    def _is_deaf(self) -> bool:
        if undone() or torch.compiler.is_compiling():
            return True
        return self.deaf is not None and self.deaf == threading.get_ident()

    def _restored(self, module: nn.Module) -> None:
        if not _is_whole(module):
            return
        # What it holds is there already, and need not have been restored by torch.
        for each in (module, *(child for _, child in held_by(module))):
            if _is_whole(each):
                hooks.drop_strays(each)
        if self._is_deaf():
            return
        self.member(module)
        self.changed()

    def changed(self) -> None:
        """More than single modules that came: from now on `tops` tells all again."""
        self._fresh = None
        self._on_change()

    def follow(self, cls: Any) -> None:
        """Know every module of a class that puts children into itself without a word, from construction on."""

        def made(_: Any, *call: Any) -> None:
            self.member(given(*call, 0, "self"))
            self.changed()

        follow(cls, "__init__", self._guard, after=made)

    def called(self, module: nn.Module) -> None:
        """`module` is known from now on, if nobody told of it before."""
        if id(module) not in self._members:
            self._meet(module)

    def _meet(self, module: nn.Module) -> None:
        member = self.member(module)
        if self._fresh is not None:
            self._fresh[id(module)] = member

    def member(self, module: nn.Module) -> Member:
        """What is known of the module; from now on it is known."""
        key = id(module)
        member = self._members.get(key)
        if member is None:
            member = Member(weakref.ref(module, lambda _: self._gone(key)), next(self._serials))
            self._members[key] = member
        return member

    def _gone(self, key: int) -> None:
        member = self._members.pop(key, None)
        if self._fresh is not None:
            self._fresh.pop(key, None)
        if member is not None and member.model:
            self._on_gone(member.serial)

    def members(self) -> list[Member]:
        """All of them, in order of construction."""
        return sorted(self._members.values(), key=lambda member: member.serial)

    def modules(self) -> list[nn.Module]:
        """All that live, in order of construction."""
        return _live(self.members())

    def tops(self) -> list[nn.Module]:
        """Live modules that are in no other, in order of construction.

        Only those that have come since it was asked last, if they are single modules and nothing else has changed: a
        job may make a loss function, which registers a weight, in every step.
        """
        fresh, self._fresh = self._fresh, {}
        if fresh is not None:
            live = _live(list(fresh.values()))
            if self._are_single(live):
                return live
        # Read off the modules: what holds children may put them there without a word, as `nn.ModuleList.insert` does.
        live = self.modules()
        seen = set(map(id, live))
        held: set[int] = set()
        stack = list(live)
        while stack:
            for _, child in held_by(stack.pop()):
                held.add(id(child))
                if id(child) not in seen:
                    seen.add(id(child))
                    stack.append(child)
        return [module for module in live if id(module) not in held]

    def _are_single(self, modules: list[nn.Module]) -> bool:
        """Whether they hold nothing, and nothing holds them."""
        wanted = set(map(id, modules))
        if any(map(held_by, modules)):
            return False
        if not wanted:
            return True
        everything = _live(list(self._members.values()))
        return all(wanted.isdisjoint(map(id, own(module, "_modules", {}).values())) for module in everything)


def _is_whole(module: nn.Module) -> bool:
    """Not so is what torch.compile restores of a module that it has guards on: it saves no more than these need."""
    names = ("_modules", "_forward_hooks", "_forward_pre_hooks")
    return all(hasattr(own(module, name, None), "items") for name in names)


def _live(members: list[Member]) -> list[nn.Module]:
    return [module for member in members if (module := member.module()) is not None]
