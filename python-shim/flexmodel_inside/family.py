"""Every module's parents, known from construction on, so that the top of any module can be told at any time."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator

from torch import nn

from .naming import own


class _Node:
    __slots__ = ("module", "parents", "serial")

    def __init__(self, module: weakref.ref[nn.Module], serial: int) -> None:
        self.module = module
        self.serial = serial
        self.parents: list[weakref.ref[nn.Module]] = []


class Family:
    """A weak child -> parents map. Keyed by identity: modules may define `__eq__`."""

    def __init__(self, on_change: Callable[[], None]) -> None:
        self._nodes: dict[int, _Node] = {}
        self._serials = itertools.count()
        self._on_change = on_change

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
        for child in own(module, "_modules", {}).values():
            if isinstance(child, nn.Module):
                self._join(module, child)
        self._on_change()

    def _join(self, parent: nn.Module, child: nn.Module) -> None:
        self._node(parent)
        parents = self._node(child).parents
        if not any(p() is parent for p in parents):
            parents.append(weakref.ref(parent))

    def meet(self, module: nn.Module) -> None:
        """From now on this module is known."""
        self._node(module)

    def serial(self, module: nn.Module) -> int:
        """A number of the module's own, in the order in which modules were met."""
        return self._node(module).serial

    def _node(self, module: nn.Module) -> _Node:
        key = id(module)
        node = self._nodes.get(key)
        if node is None:
            nodes = self._nodes
            node = _Node(weakref.ref(module, lambda _: nodes.pop(key, None)), next(self._serials))
            nodes[key] = node
        return node

    def _parent(self, module: nn.Module) -> nn.Module | None:
        for ref in self._node(module).parents:
            parent = ref()
            if parent is not None and any(c is module for c in own(parent, "_modules", {}).values()):
                return parent
        return None

    def tops(self) -> Iterator[nn.Module]:
        """Live modules that are in no other, in order of construction."""
        for node in sorted(self._nodes.values(), key=lambda n: n.serial):
            module = node.module()
            if module is not None and self._parent(module) is None:
                yield module
