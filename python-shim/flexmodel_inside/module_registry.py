"""Every live module, known from construction on, and which of them are roots: in no other module."""

from __future__ import annotations

import contextlib
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from . import hooks
from .naming import held_by, is_module, own
from .patches import follow, given, undone


class Member:
    """What is known of a module, for as long as that lives."""

    __slots__ = ("begins", "hooks", "marks", "model", "module", "serial", "tap", "tapped")

    def __init__(self, module: weakref.ref[nn.Module], serial: int) -> None:
        self.module = module
        # A number of its own, in the order in which modules became known.
        self.serial = serial
        # Whether it is a model whose passes are counted.
        self.model = False
        # The serials of models whose passes it marks; the model and the name that its tap is for, and the tap's number.
        self.marks: set[int] = set()
        # Those of which it is the first part that the job called by itself.
        self.begins: set[int] = set()
        self.tapped: tuple[int, str] | None = None
        self.tap = -1
        # Hooks of ours: the attribute of the module, and the key.
        self.hooks: list[tuple[str, int]] = []


class ModuleRegistry:
    """Every live module. Keyed by identity: modules may define `__eq__`."""

    def __init__(
        self, guard: Callable[..., Any], on_change: Callable[[], None], on_destroyed: Callable[[int], None]
    ) -> None:
        # Makes of a function one that raises nothing.
        self._guard = guard
        self._members: dict[int, Member] = {}
        self._serials = itertools.count()
        # Those met since `roots` was asked, while nothing else has changed; None if something has.
        self._fresh: dict[int, Member] | None = None
        # The thread in which torch.compile makes modules of its own, and those in which others do.
        self.ignored_thread: int | None = None
        self._ignored: set[int] = set()
        self._on_change = on_change
        # Called with the serial of a model that is destroyed.
        self._on_destroyed = on_destroyed

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
        if is_module(child) and not self._is_ignored():
            self.member(parent)
            self.member(child)
            self.changed()

    def _has(self, module: nn.Module, name: str, value: Any) -> None:
        # Also called when one is assigned anew, which some modules do in every forward.
        if not self._is_ignored() and id(module) not in self._members:
            self._meet(module)
            self._on_change()

    def _is_ignored(self) -> bool:
        if undone() or torch.compiler.is_compiling():
            return True
        thread = threading.get_ident()
        return thread == self.ignored_thread or thread in self._ignored

    @contextlib.contextmanager
    def ignoring(self) -> Iterator[None]:
        """Modules that this thread makes meanwhile are not the job's."""
        thread = threading.get_ident()
        is_outermost = thread not in self._ignored
        self._ignored.add(thread)
        try:
            yield
        finally:
            if is_outermost:
                self._ignored.discard(thread)

    def _restored(self, module: nn.Module) -> None:
        if not _is_whole(module):
            return
        # What it holds is there already, and need not have been restored by torch.
        for each in (module, *(child for _, child in held_by(module))):
            if _is_whole(each):
                hooks.drop_strays(each)
        if self._is_ignored():
            return
        self.member(module)
        self.changed()

    def changed(self) -> None:
        """More than single modules that came: `roots` gives all of them again."""
        self.all_again()
        self._on_change()

    def all_again(self) -> None:
        """`roots` gives all of them again."""
        self._fresh = None

    def called(self, module: nn.Module) -> None:
        """`module` is known from now on, if it was not."""
        if id(module) not in self._members:
            self._meet(module)

    def _meet(self, module: nn.Module) -> None:
        member = self.member(module)
        if self._fresh is not None:
            self._fresh[id(module)] = member

    def known(self, module: nn.Module) -> Member | None:
        """What is known of the module, if anything is."""
        return self._members.get(id(module))

    def member(self, module: nn.Module) -> Member:
        """What is known of the module; from now on it is known."""
        key = id(module)
        member = self._members.get(key)
        if member is None:
            member = Member(weakref.ref(module, lambda _: self._destroyed(key)), next(self._serials))
            self._members[key] = member
        return member

    def tapped_as(self, module: nn.Module) -> str | None:
        """The name under which a module is tapped; None if it is not."""
        member = self._members.get(id(module))
        return None if member is None or member.tapped is None else member.tapped[1]

    def _destroyed(self, key: int) -> None:
        member = self._members.pop(key, None)
        if self._fresh is not None:
            self._fresh.pop(key, None)
        if member is not None and member.model:
            self._on_destroyed(member.serial)

    def members(self) -> list[Member]:
        """All of them, in order of construction."""
        return sorted(self._members.values(), key=lambda member: member.serial)

    def modules(self) -> list[nn.Module]:
        """All that live, in order of construction."""
        return _live(self.members())

    def roots(self) -> list[nn.Module]:
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
    """False for what torch.compile restores of a module that it has guards on: it saves only what these need."""
    names = ("_modules", "_forward_hooks", "_forward_pre_hooks")
    return all(hasattr(own(module, name, None), "items") for name in names)


def _live(members: list[Member]) -> list[nn.Module]:
    return [module for member in members if (module := member.module()) is not None]
