"""Modules that some ranks lack: those of a pipeline's stages, and experts.

`agent/src/store/owners.rs` says the same in Rust.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ._types import Axis, Identity, Owners, Part


class Scattered:
    """Who has them. Nothing is known before every rank of `world` has said what it has."""

    def __init__(self, owners: Sequence[Owners], world: int) -> None:
        told = {rank for group in owners for rank in group.ranks}
        self._ranks: dict[int, dict[str, set[int]]] = {}
        if len(owners) < 2 or world < 2 or not told >= set(range(world)):
            return
        for model in {group.model for group in owners} - {None}:
            ranks: dict[str, set[int]] = {}
            for group in owners:
                # A model that has no number on a rank may be any.
                for module in group.modules if group.model in (model, None) else ():
                    ranks.setdefault(module, set()).update(group.ranks)
            self._ranks[model] = {module: those for module, those in ranks.items() if len(those) < len(told)}

    def _owners(self, model: int, name: str) -> set[int] | None:
        """The ranks that have a module, or the one that a parameter is in; None: all."""
        ranks = self._ranks.get(model)
        while ranks and name not in ranks:
            name, dot, _ = name.rpartition(".")
            if not dot:
                return None
        return ranks[name] if ranks else None

    def settled(self, what: Identity, parts: list[Part]) -> list[Part]:
        """The parts of a record as they lie among those ranks alone that have its module, once all of these are there.

        Along an axis on which they are one member they are no pieces, and along one whose other members lack the module
        it is not known what they are.
        """
        if not self._ranks or self._owners(what.model, what.module) != {part.rank for part in parts}:
            return parts
        depth = min(len(part.axes) for part in parts)
        if any(len(part.axes) != depth for part in parts):
            return parts
        for at in reversed(range(depth)):
            members = sorted({part.axes[at].index for part in parts})
            if any(_fits(part.axes[at], len(members)) for part in parts):
                continue
            parts = [part._replace(axes=_among(part.axes, at, members)) for part in parts]
        return parts


def _fits(axis: Axis, members: int) -> bool:
    return axis.name == "micro" or members == axis.size or axis.place in ("replicate", "flat", "partial")


def _among(axes: tuple[Axis, ...], at: int, members: list[int]) -> tuple[Axis, ...]:
    if len(members) == 1:
        return axes[:at] + axes[at + 1 :]
    index = members.index(axes[at].index)
    own = dataclasses.replace(axes[at], index=index, size=len(members), place="unknown", dim=-1, given=None)
    return (*axes[:at], own, *axes[at + 1 :])
