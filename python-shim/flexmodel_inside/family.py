"""Every module's parents, known from construction on, so that the top of any module can be told at any time."""

from __future__ import annotations

import functools
import itertools
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from .naming import own

_HOOKS = {
    "_forward_hooks": ("_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    "_forward_pre_hooks": ("_forward_pre_hooks_with_kwargs",),
}


class Member:
    """What is known of a module; it goes when the module goes."""

    __slots__ = ("hooks", "model", "module", "parents", "scoped", "serial", "tapped")

    def __init__(self, module: weakref.ref[nn.Module], serial: int) -> None:
        self.module = module
        # A number of its own, in the order in which modules were met.
        self.serial = serial
        self.parents: list[weakref.ref[nn.Module]] = []
        # Whether it is a model with taps, and has the hooks of a scope, and of a selected module.
        self.model = False
        self.scoped = False
        self.tapped = False
        # Where they are: the attribute of the module, and the key.
        self.hooks: list[tuple[str, int]] = []


class Family:
    """A weak child -> parents map. Keyed by identity: modules may define `__eq__`."""

    def __init__(self, on_change: Callable[[], None], on_gone: Callable[[int], None]) -> None:
        self._members: dict[int, Member] = {}
        self._serials = itertools.count()
        self._on_change = on_change
        # Told the serial of a model that is no more.
        self._on_gone = on_gone

    def watch(self) -> None:
        """Follow every registration of a submodule, and every copy, which registers nothing."""
        nn.modules.module.register_module_module_registration_hook(self._registered)
        original = nn.Module.__setstate__
        family = self

        def __setstate__(self: nn.Module, state: dict) -> None:
            original(self, state)
            family._restored(self)

        nn.Module.__setstate__ = __setstate__  # type: ignore[method-assign]

    def _registered(self, parent: nn.Module, name: str, child: nn.Module | None) -> None:
        if isinstance(child, nn.Module):
            self._join(parent, child)
            self._on_change()

    def _restored(self, module: nn.Module) -> None:
        drop_copied_hooks(module)
        for child in own(module, "_modules", {}).values():
            if isinstance(child, nn.Module):
                self._join(module, child)
        self._on_change()

    def _join(self, parent: nn.Module, child: nn.Module) -> None:
        self.member(parent)
        parents = self.member(child).parents
        if not any(p() is parent for p in parents):
            parents[:] = [p for p in parents if p() is not None]
            parents.append(weakref.ref(parent))

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
        if member is not None and member.model:
            self._on_gone(member.serial)

    def members(self) -> list[Member]:
        """All of them, in order of construction."""
        return sorted(self._members.values(), key=lambda member: member.serial)

    def _parent(self, module: nn.Module) -> nn.Module | None:
        for ref in self.member(module).parents:
            parent = ref()
            if parent is not None and any(c is module for c in own(parent, "_modules", {}).values()):
                return parent
        return None

    def tops(self) -> Iterator[nn.Module]:
        """Live modules that are in no other, in order of construction."""
        for member in self.members():
            module = member.module()
            if module is not None and self._parent(module) is None:
                yield module


def drop_copied_hooks(module: nn.Module) -> None:
    """Takes out what our hooks become in a copy: they do nothing there, and a copy of a copy would have ever more."""
    for name, more in _HOOKS.items():
        hooks = own(module, name, {})
        for key in [key for key, hook in hooks.items() if _is_copied(hook)]:
            for kind in (name, *more):
                own(module, kind, {}).pop(key, None)


def _is_copied(hook: Any) -> bool:
    """See `reduce` in `cxx-bridge/cpp/tap.cc`."""
    return type(hook) is functools.partial and hook.func is sys.audit and hook.args == ("flexmodel.copied",)
