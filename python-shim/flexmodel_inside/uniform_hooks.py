"""Gives modules that may share a graph of torch.compile's the same hooks.

Blocks of one class share one graph, which torch.compile makes for the first of them. It has no guard on a module
without hooks, and would run the graph of a block without taps for one with taps; where it has a guard, it would compile
each block anew. So a module without a tap is padded: it gets a hook that makes the same graph and does nothing.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from . import hooks
from .compiled import Traced
from .naming import held_by, is_scripted, own

_MAX_DEPTH = 32


def pad(modules: list[nn.Module], may_change: Callable[[nn.Module], bool] = lambda _: True) -> list[nn.Module]:
    """Give modules that may share a graph the same hooks: those of one class. `modules` are all there are. Those are
    returned that now have more in a graph than before, which none has that may not change."""
    changed: list[nn.Module] = []
    parents: dict[int, list[tuple[str, nn.Module]]] = {}
    for module in modules:
        for key, child in held_by(module):
            parents.setdefault(id(child), []).append((key, module))
    sharing: dict[type, list[nn.Module]] = {}
    for module in modules:
        if _may_have_a_graph(module):
            sharing.setdefault(type(module), []).append(module)
    # By class, by the names on the way down: the hooks that any of the class has there.
    wanted: dict[type, dict[tuple[str, ...], list[tuple[str, int, Traced]]]] = {}
    for module in modules:
        found = _traced_of(module)
        stack: list[tuple[tuple[str, ...], nn.Module]] = [((), module)] if found else []
        while stack:
            way, above = stack.pop()
            if type(above) in sharing:
                wanted.setdefault(type(above), {}).setdefault(way, []).extend(found)
            if len(way) < _MAX_DEPTH:
                stack.extend(((key, *way), parent) for key, parent in parents.get(id(above), ()))
    for cls, ways in wanted.items():
        for way, found in ways.items():
            for module in sharing[cls]:
                below = _down(module, way)
                if below is not None and may_change(below):
                    grown = [_pad_one(below, name, key, like) for name, key, like in found]
                    changed += [below] if any(grown) else []
    return changed


def _may_have_a_graph(module: nn.Module) -> bool:
    """Whether torch.compile may begin a graph with its forward: with one of torch's only if the job asks for it."""
    if not type(module).__module__.startswith("torch.nn."):
        return True
    return own(module, "_compiled_call_impl", None) is not None or isinstance(module, nn.Sequential)


def _traced_of(module: nn.Module) -> list[tuple[str, int, Traced]]:
    names = ("_forward_pre_hooks", "_forward_hooks")
    return [(name, k, h) for name in names for k, h in own(module, name, {}).items() if isinstance(h, Traced)]


def _down(module: nn.Module | None, way: tuple[str, ...]) -> nn.Module | None:
    for key in way:
        module = own(module, "_modules", {}).get(key) if module is not None else None
    return module if isinstance(module, nn.Module) and not is_scripted(module) else None


def _pad_one(module: nn.Module, name: str, key: int, like: Traced) -> bool:
    there = own(module, name, {})
    is_new = key not in there
    if is_new:
        hooks.put(module, name, key, like.padding())
    mine = there[key]
    if not isinstance(mine, Traced):
        return False
    grows = bool(like.kinds & ~mine.kinds or like.edits & ~mine.edits)
    mine.kinds |= like.kinds
    mine.edits |= like.edits
    return is_new or grows
