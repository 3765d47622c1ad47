"""Modules that some ranks lack: those of a pipeline's stages, and experts.

`agent/run/src/owners.rs` says the same in Rust.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ._limits import DEPTH, OWNED
from ._types import Axis, Identity, Owners, Part


class Scattered:
    """Who has them. Nothing is known before every rank of `world` has said what it has."""

    def __init__(self, owners: Sequence[Owners], world: int) -> None:
        self._groups: list[frozenset[int]] = []
        self._having: dict[int | None, dict[str, list[int]]] = {}  # by model and module, the groups
        self._unions: dict[tuple[int, ...], set[int] | None] = {}
        self._left = OWNED
        told = {rank for group in owners for rank in group.ranks}
        # How many first: a world of four billion is not gone through.
        if len(owners) < 2 or world < 2 or len(told) < world or not all(rank in told for rank in range(world)):
            return
        self._told = len(told)
        for number, group in enumerate(owners):
            self._groups.append(frozenset(group.ranks))
            having = self._having.setdefault(group.model, {})
            for module in group.modules:
                having.setdefault(module, []).append(number)

    def _owners(self, model: int, name: str) -> set[int] | None:
        """The ranks that have a module, or the one that a parameter is in; None: all."""
        own, others = self._having.get(model), self._having.get(None, {})
        if own is None:
            return None
        for _ in range(DEPTH):
            # A model that has no number on a rank may be any.
            groups = (*own.get(name, ()), *others.get(name, ()))
            if groups and (ranks := self._union(groups)) is not None:
                return ranks
            name, dot, _ = name.rpartition(".")
            if not dot:
                return None
        return None

    def _union(self, groups: tuple[int, ...]) -> set[int] | None:
        """The ranks in any of these groups; None where these are all, or too many to be told."""
        if groups not in self._unions:
            self._left -= sum(len(self._groups[n]) for n in groups)
            ranks = set().union(*(self._groups[n] for n in groups)) if self._left > 0 else None
            self._unions[groups] = None if ranks is None or len(ranks) == self._told else ranks
        return self._unions[groups]

    def settled(self, what: Identity, parts: list[Part]) -> list[Part]:
        """The parts of a record as they lie among those ranks alone that have its module, once all of these are there.

        Along an axis on which they are one member they are no pieces, and along one whose other members lack the module
        it is not known what they are.
        """
        if not self._groups or self._owners(what.model, what.module) != {part.rank for part in parts}:
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
