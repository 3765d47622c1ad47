"""The mesh: the axes along which a job distributes a model, and where on them this process is."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from typing import Any, NamedTuple

from ._bridge import ROLE_ASSUMED as ASSUMED
from ._bridge import ROLE_CONTEXT as CONTEXT
from ._bridge import ROLE_DATA as DATA
from ._bridge import ROLE_OTHER as OTHER
from ._bridge import ROLE_PIPELINE as PIPELINE
from ._bridge import ROLE_TENSOR as TENSOR

# Who has other experts may have rows of the batch of its own, or the same.
_EXPERTS = frozenset(("ep", "expert", "experts"))
# The axis of ranks that no axis reaches.
_REST = "rest"
# What the names that people give to mesh axes are made of.
_WORDS = {
    **dict.fromkeys(("dp", "ddp", "fsdp", "hsdp", "efsdp", "edp", "data", "batch", "replicate", "shard"), DATA),
    **dict.fromkeys(("tp", "etp", "mp", "tensor", "model"), TENSOR),
    **dict.fromkeys(("cp", "sp", "context", "sequence", "seq"), CONTEXT),
    **dict.fromkeys(("pp", "pipe", "pipeline", "stage"), PIPELINE),
    **dict.fromkeys(_EXPERTS, OTHER),
}


class Axis(NamedTuple):
    """One axis of a mesh."""

    name: str
    # This process's coordinate, and the number of members.
    index: int
    size: int
    role: int
    # The global ranks of its members that share this process's other coordinates, in the order of their coordinates.
    # No process group is kept: code that communicates opens a communicator of its own between these.
    ranks: tuple[int, ...]

    def placed(self, place: int, dim: int = 0) -> tuple[str, int, int, int, int]:
        """How a tensor lies along it: a code of `layouts` and, of a shard, the dimension."""
        return self.name, self.index, self.size, place, dim


def role_of(name: str, otherwise: int) -> int:
    """What an axis of that name is there for."""
    return next((_WORDS[word] for word in _words(name) if word in _WORDS), otherwise)


def _words(name: str) -> list[str]:
    return re.findall("[a-z]+", name.lower())


class Meshes:
    """The axes of every device mesh met so far, each under one name for good."""

    def __init__(self) -> None:
        self._axes: dict[Any, list[Axis]] = {}
        self._names: dict[tuple[int, ...], str] = {}
        # The axes of those of the job's own that have names and reach all ranks.
        self.whole: list[list[Axis]] = []
        # Names of the process groups over which frameworks distribute models, by their members. No group is kept.
        self.groups: dict[tuple[int, ...], set[str]] = {}
        # Those whose members have pieces of sequences, whatever their names, and the meshes that they are of.
        self._cut: dict[tuple[int, ...], Any] = {}

    def forget(self) -> None:
        """This process is of another process group: meshes of the one before are equal to its own, but this process may
        be elsewhere on them."""
        self._axes.clear()
        self._names.clear()
        self.whole.clear()
        self.groups.clear()
        self._cut.clear()

    def axes_of(self, mesh: Any, role: int = OTHER) -> list[Axis]:
        """The axes of a `DeviceMesh`, outermost first; none if this process is not on it.

        `role` is for axes whose names say nothing.
        """
        coordinate = mesh.get_coordinate()
        # Meshes of the same ranks are equal, also where this process was another rank when one of them was made.
        key = mesh, role, tuple(coordinate or ())
        if key not in self._axes:
            names = mesh.mesh_dim_names or (None,) * mesh.ndim
            try:
                groups = [self._met(mesh.get_group(dim)) for dim in range(mesh.ndim)] if coordinate else []
            except RuntimeError:  # a mesh for planning, without process groups
                groups = []
            self._axes[key] = [
                self._axis(name, ranks, index, role)
                for name, ranks, index in zip(names, groups, coordinate or (), strict=False)
            ]
        return self._axes[key]

    def axis_of_group(self, group: Any, name: str, role: int) -> Axis:
        """The axis whose members are a process group."""
        ranks = self._met(group)
        return self._axis(name, ranks, ranks.index(sys.modules["torch.distributed"].get_rank()), role)

    def _met(self, group: Any) -> tuple[int, ...]:
        """The global ranks of a process group over which something is distributed."""
        ranks = group_ranks(group)
        # None stands for the group of all ranks.
        if getattr(group, "group_name", None):
            self.groups.setdefault(ranks, set()).add(group.group_name)
        return ranks

    def cut_along(self, mesh: Any) -> tuple[Axis | None, bool]:
        """The job cuts sequences over a mesh: its axis, if it has one alone, and whether that was not known."""
        axes = self.axes_of(mesh, CONTEXT)
        if len(axes) != 1:
            return None, False
        is_new = axes[0].size > 1 and axes[0].ranks not in self._cut
        if is_new:
            self._cut[axes[0].ranks] = mesh
            self._axes.clear()
        return self.axes_of(mesh, CONTEXT)[0], is_new

    def cut_meshes(self) -> list[Any]:
        """The meshes over which the job cuts sequences."""
        return list(self._cut.values())

    def _axis(self, name: str | None, ranks: tuple[int, ...], index: int, role: int) -> Axis:
        known = self._names.get(ranks)
        if known is None or len(ranks) == 1:
            known = name or {DATA: "dp", TENSOR: "tp", CONTEXT: "cp", PIPELINE: "pp"}.get(role, "axis")
            while len(ranks) > 1 and known in self._names.values():
                known += "'"
            self._names[ranks] = known
        by_name = CONTEXT if ranks in self._cut else role_of(name or known, role)
        # Who averages gradients over an axis has the batch on it, or pieces of its sequences, whatever its name.
        return Axis(known, index, len(ranks), role if role == DATA and by_name != CONTEXT else by_name, ranks)

    def of_model(self, stated: list[Axis], rank: int, world: int) -> list[Axis]:
        """The axes over which the job distributes a model, outermost first, without those of a pipeline's stages.

        `stated` are those that wrappers, parameters and stages state. Where there are none, they are those of the job's
        own mesh that reaches all ranks. Where it has none, or several, all ranks are assumed to share the batch.
        """
        if world == 1:
            return []
        found: dict[tuple[int, ...], Axis] = {}
        for axis in stated:
            if axis.size > 1:
                found.setdefault(axis.ranks, axis)
        # An axis that others are folded into says less than these.
        axes = [axis for axis in found.values() if not any(set(other) < set(axis.ranks) for other in found)]
        if not axes and self.whole and all(mesh == self.whole[0] for mesh in self.whole):
            axes = self.whole[0]
        if not axes:
            return assumed(rank, world)
        reached = _with_batch([*axes, *_rest(axes, rank, world)], found.values())
        return [axis for axis in reached if axis.role != PIPELINE]


def assumed(rank: int, world: int) -> list[Axis]:
    """The axes of a model of which nothing says how the job distributes it."""
    return [Axis("dp", rank, world, ASSUMED, tuple(range(world)))] if world > 1 else []


def unknown(rank: int, world: int) -> list[Axis]:
    """The axes of a model of which something says how the job distributes it that could not be read."""
    return [Axis("rank", rank, world, OTHER, tuple(range(world)))] if world > 1 else []


def group_ranks(group: Any) -> tuple[int, ...]:
    """The global ranks of a process group, in its order."""
    return tuple(sys.modules["torch.distributed"].get_process_group_ranks(group))


def _with_batch(axes: list[Axis], stated: Iterable[Axis]) -> list[Axis]:
    """The same, where there are experts, with the role of the batch for their axis, or what is left of it, that lies
    inside of an axis of the batch: experts are on ranks among which a wrapper shares it. Axes of the batch are in the
    order of its rows."""
    stated = list(stated)
    experts = {axis.name for axis in stated if axis.role == OTHER and not _EXPERTS.isdisjoint(_words(axis.name))}
    if not experts:
        return axes
    experts.add(_REST)
    batches = [set(axis.ranks) for axis in stated if axis.role == DATA]
    folded = [any(set(axis.ranks) < batch for batch in batches) for axis in axes]
    out = [
        axis._replace(role=DATA) if inside and axis.name in experts else axis
        for axis, inside in zip(axes, folded, strict=True)
    ]
    places = [at for at, axis in enumerate(out) if axis.role == DATA and folded[at]]
    ordered = sorted((out[at] for at in places), key=lambda axis: axis.ranks[0] - axis.ranks[1])
    for at, axis in zip(places, ordered, strict=True):
        out[at] = axis
    return out


def _rest(axes: list[Axis], rank: int, world: int) -> list[Axis]:
    """An axis for the ranks that `axes` do not reach from here, as if they were laid out in the same way."""
    here = {0}
    for axis in axes:
        here = {base + other - axis.ranks[axis.index] for base in here for other in axis.ranks}
    others = world // len(here)
    if others <= 1:
        return []
    left, cells = set(range(world)), []
    while left:
        first = min(left)
        cells.append(sorted({first - min(here) + step for step in here} & left))
        left -= set(cells[-1])
    index = next(i for i, cell in enumerate(cells) if rank in cell)
    place = cells[index].index(rank)
    # Cells are of one length unless ranks are laid out in another way here than there.
    return [Axis(_REST, index, len(cells), OTHER, tuple(cell[min(place, len(cell) - 1)] for cell in cells))]
