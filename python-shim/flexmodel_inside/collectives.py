"""How many collectives the ranks of an axis have called together: a clock that they share.

The members of a process group call its collectives in one order, and torch numbers them. Gloo numbers what is sent from
one member to another too, of which others know nothing: that is subtracted.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import patches
from .mesh import Axis, Meshes

MODULE = "torch.distributed.distributed_c10d"
# Methods of a process group that not all members call alike.
_BETWEEN_MEMBERS = ("send", "recv", "recv_anysource", "monitored_barrier")
_UNKNOWN = -1


class Collectives:
    """Counts them for the axes of each model."""

    def __init__(self, meshes: Meshes, is_reducing: Callable[[], bool]) -> None:
        self._meshes = meshes
        self._is_reducing = is_reducing
        self._axes: dict[int, tuple[tuple[int, ...], ...]] = {}
        # Models whose gradients are reduced whoever calls them.
        self._reducing: set[int] = set()
        # By the name of a process group: no group is held, since one that the job destroyed would live on.
        self._between_members: dict[str, int] = {}

    def follow(self, guard: Callable[..., Any]) -> None:
        """Follow what is sent between members."""
        group_class = sys.modules[MODULE].ProcessGroup
        for name in _BETWEEN_MEMBERS:
            if hasattr(group_class, name):
                patches.wrap(group_class, name, functools.partial(self._counted, guard=guard))

    def put(self, serial: int, axes: Sequence[Axis], reduces: bool) -> None:
        """A model is distributed along these axes. `reduces`: any backward pass through it reduces gradients."""
        self._axes[serial] = tuple(axis.ranks for axis in axes)
        (self._reducing.add if reduces else self._reducing.discard)(serial)

    def drop(self, serial: int) -> None:
        """The model was destroyed."""
        self._axes.pop(serial, None)
        self._reducing.discard(serial)

    def now(self, serial: int) -> tuple[int, ...]:
        """Whether gradients of a model that is called now are reduced in its backward pass, and for each of its
        axes how many collectives its members have called together, -1 where that is not known."""
        axes = self._axes.get(serial, ())
        if not axes:
            return (False,)
        reduces = self._is_reducing() or (serial in self._reducing and torch.is_grad_enabled())
        return (reduces, *(self._count(ranks) for ranks in axes))

    def _count(self, ranks: tuple[int, ...]) -> int:
        c10d = sys.modules.get(MODULE)
        if c10d is None or not c10d.is_initialized():
            return _UNKNOWN
        # Those alone over which models are distributed: in others a thread of the job's may call collectives meanwhile.
        names = self._meshes.groups.get(ranks) or {c10d._get_default_group().group_name}
        groups = [
            group
            for group, members in c10d._world.pg_group_ranks.items()
            # What stands for a group that this process is no member of has no name.
            if getattr(group, "group_name", None) in names and len(members) == len(ranks)
        ]
        if not groups:
            return _UNKNOWN
        return sum(_number(group) - self._between_members.get(group.group_name, 0) for group in groups)

    def _counted(self, original: Any, guard: Callable[..., Any]) -> Callable[..., Any]:
        count = guard(self._add, "counting what is sent between ranks")
        number = guard(_number, "counting what is sent between ranks")

        def counted(*args: Any, **kwargs: Any) -> Any:
            before = number(args[0]) if args else None
            result = original(*args, **kwargs)
            if before is not None:
                count(args[0], before)
            return result

        return counted

    def _add(self, group: Any, before: int) -> None:
        sent = _number(group) - before
        if sent:
            name = group.group_name
            self._between_members[name] = self._between_members.get(name, 0) + sent


def _number(group: Any) -> int:
    return int(group._get_sequence_number_for_group())
