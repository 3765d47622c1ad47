"""The mesh: the axes along which a job distributes a model, and where on them this process is.

Nothing is imported that the job has not imported.
"""

from __future__ import annotations

import math
import re
import sys
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from ._bridge import ROLE_CONTEXT as CONTEXT
from ._bridge import ROLE_DATA as DATA
from ._bridge import ROLE_OTHER as OTHER
from ._bridge import ROLE_PIPELINE as PIPELINE
from ._bridge import ROLE_SUPPOSED as SUPPOSED
from ._bridge import ROLE_TENSOR as TENSOR
from .faults import Faults
from .naming import all_in, own, stored
from .patches import follow, given
from .wrappers import fsdp2_groups, is_instance

MODULE = "torch.distributed.device_mesh"

# What the names that people give to mesh axes are made of.
_WORDS = {
    **dict.fromkeys(("dp", "ddp", "fsdp", "hsdp", "data", "batch", "replicate", "shard"), DATA),
    **dict.fromkeys(("tp", "mp", "tensor", "model"), TENSOR),
    **dict.fromkeys(("cp", "sp", "context", "sequence", "seq"), CONTEXT),
    **dict.fromkeys(("pp", "pipe", "pipeline", "stage"), PIPELINE),
}


class Axis(NamedTuple):
    """One axis of a mesh."""

    name: str
    # This process's coordinate, and the number of members.
    index: int
    size: int
    role: int
    # The global ranks of its members that share this process's other coordinates.
    ranks: tuple[int, ...]


def role_of(name: str, otherwise: int) -> int:
    """What an axis of that name is there for."""
    return next((_WORDS[word] for word in re.findall("[a-z]+", name.lower()) if word in _WORDS), otherwise)


class Meshes:
    """The axes of every device mesh met so far, each under one name for good."""

    def __init__(self, faults: Faults) -> None:
        self._faults = faults
        self._axes: dict[Any, list[Axis]] = {}
        self._names: dict[tuple[int, ...], str] = {}
        # Of the job's own, in the order in which it made them.
        self._made: list[weakref.ref[Any]] = []
        # The axes of those that have names and reach all ranks.
        self._whole: list[list[Axis]] = []
        # Those whose members have pieces of sequences, whatever their names, and the meshes that they are of.
        self._contexts: dict[tuple[int, ...], Any] = {}

    def watch(self) -> None:
        """Note every mesh that the job makes: the names that it gives to axes say what wrappers that use them do not.

        The class must be imported.
        """
        made = self._made
        follow(
            sys.modules[MODULE].DeviceMesh,  # type: ignore[attr-defined]
            "__init__",
            self._faults.guard,
            after=lambda _, *call: made.append(weakref.ref(given(*call, 0, "self"))),
        )

    def _meet(self) -> None:
        """Names the axes of meshes that were made since the last time."""
        while self._made:
            mesh = self._made.pop(0)()
            if mesh is not None:
                self._faults.of("a device mesh", self._meet_one, mesh)

    def _meet_one(self, mesh: Any) -> None:
        if getattr(mesh, "mesh_dim_names", None):
            axes = self.axes_of(mesh)
            if math.prod(axis.size for axis in axes) == sys.modules["torch.distributed"].get_world_size():
                self._whole.append([axis for axis in axes if axis.size > 1])

    def axes_of(self, mesh: Any, role: int = OTHER) -> list[Axis]:
        """The axes of a `DeviceMesh`, outermost first; none if this process is not on it.

        `role` is for axes whose names say nothing.
        """
        if (mesh, role) not in self._axes:
            coordinate = mesh.get_coordinate()
            names = mesh.mesh_dim_names or (None,) * mesh.ndim
            try:
                groups = [group_ranks(mesh.get_group(dim)) for dim in range(mesh.ndim)] if coordinate else []
            except RuntimeError:  # a mesh for planning, without process groups
                groups = []
            self._axes[mesh, role] = [
                self._axis(name, ranks, index, role)
                for name, ranks, index in zip(names, groups, coordinate or (), strict=False)
            ]
        return self._axes[mesh, role]

    def axis_of_group(self, group: Any, name: str, role: int) -> Axis:
        """The axis whose members are a process group."""
        ranks = group_ranks(group)
        return self._axis(name, ranks, ranks.index(sys.modules["torch.distributed"].get_rank()), role)

    def context_of(self, mesh: Any) -> tuple[Axis | None, bool]:
        """The axis of a mesh over which the job cuts sequences, if it is one, and whether that is news."""
        axes = self.axes_of(mesh, CONTEXT)
        if len(axes) != 1:
            return None, False
        news = axes[0].size > 1 and axes[0].ranks not in self._contexts
        if news:
            self._contexts[axes[0].ranks] = mesh
            self._axes.clear()
        return self.axes_of(mesh, CONTEXT)[0], news

    def _axis(self, name: str | None, ranks: tuple[int, ...], index: int, role: int) -> Axis:
        known = self._names.get(ranks)
        if known is None or len(ranks) == 1:
            known = name or {DATA: "dp", TENSOR: "tp", CONTEXT: "cp", PIPELINE: "pp"}.get(role, "axis")
            while len(ranks) > 1 and known in self._names.values():
                known += "'"
            self._names[ranks] = known
        said = CONTEXT if ranks in self._contexts else role_of(known, role)
        # Who averages gradients over an axis has the batch on it, or pieces of its sequences, whatever its name.
        return Axis(known, index, len(ranks), role if role == DATA and said != CONTEXT else said, ranks)

    def of_model(self, top: nn.Module, rank: int, world: int, stages: list[Axis]) -> list[Axis]:
        """The axes over which the job distributes a model, outermost first, without those of a pipeline's `stages`.

        Where neither wrappers nor parameters say anything, they are those of the job's own mesh that reaches all ranks.
        Where there is none, or several, all ranks are supposed to share the batch.
        """
        if world == 1:
            return []
        self._meet()
        found: dict[tuple[int, ...], Axis] = {}
        for axis in [*stages, *self._said(top), *self._cut()]:
            if axis.size > 1:
                found.setdefault(axis.ranks, axis)
        # An axis that others are folded into says less than these.
        axes = [axis for axis in found.values() if not any(set(other) < set(axis.ranks) for other in found)]
        if not axes and self._whole and all(mesh == self._whole[0] for mesh in self._whole):
            axes = self._whole[0]
        if not axes:
            return supposed(rank, world)
        return [axis for axis in [*axes, *_rest(axes, rank, world)] if axis.role != PIPELINE]

    def _said(self, top: nn.Module) -> Iterator[Axis]:
        """What the model's wrappers and parameters say."""
        roots: list[Any] = []
        of, modules = self._faults.of, all_in(top)
        for module in modules:
            yield from of(f"the mesh of a {type(module).__name__}", self._said_by, module, roots, otherwise=())
        megatron = False
        for module in modules:
            for name, parameter in stored(module).items():
                if is_instance(parameter, "torch.distributed.tensor", "DTensor"):
                    yield from of(f"the mesh of a parameter {name}", self._cut_by, parameter, roots, otherwise=())
                elif megatron_state() is not None:
                    megatron = megatron or of(name, getattr, parameter, "tensor_model_parallel", False)
        for mesh in roots:
            root = getattr(mesh, "_get_root_mesh", lambda mesh=mesh: mesh)()
            if root.mesh_dim_names:
                yield from self.axes_of(root)
        if megatron:
            yield from self._megatron()

    def _said_by(self, module: nn.Module, roots: list[Any]) -> list[Axis]:
        """What a wrapper says. `roots` gets its meshes."""
        axes = []
        for group in fsdp2_groups(module):
            roots.append(group.mesh_info.mesh)
            axes += self.axes_of(group.mesh_info.mesh, DATA)
        if is_instance(module, "torch.distributed.fsdp", "FullyShardedDataParallel"):
            between = own(module, "_inter_node_pg", None)
            if between is not None:
                axes.append(self.axis_of_group(between, "dp_replicate", DATA))
            axes.append(self.axis_of_group(module.process_group, "dp" if between is None else "dp_shard", DATA))
        if is_instance(module, "torch.nn.parallel", "DistributedDataParallel"):
            axes.append(self.axis_of_group(module.process_group, "dp", DATA))
        if is_instance(module, "deepspeed.runtime.engine", "DeepSpeedEngine"):
            axes.append(self.axis_of_group(module.data_parallel_group, "dp", DATA))
        return axes

    def _cut_by(self, parameter: Any, roots: list[Any]) -> list[Axis]:
        mesh = parameter.device_mesh
        if any(mesh == root for root in roots):
            return []
        roots.append(mesh)
        return self.axes_of(mesh, TENSOR)

    def _cut(self) -> Iterator[Axis]:
        """The axes over which the job cuts sequences, and those of the mesh that these are of."""
        for mesh in self._contexts.values():
            yield from self.axes_of(mesh, CONTEXT)
            root = getattr(mesh, "_get_root_mesh", lambda mesh=mesh: mesh)()
            if root.mesh_dim_names:
                yield from self.axes_of(root)

    def _megatron(self) -> Iterator[Axis]:
        state = megatron_state()
        for what, name, role in (
            ("pipeline_model", "pp", PIPELINE),
            ("data", "dp", DATA),
            ("context", "cp", CONTEXT),
            ("tensor_model", "tp", TENSOR),
        ):
            yield self.axis_of_group(getattr(state, f"get_{what}_parallel_group")(), name, role)


def megatron_state() -> Any:
    """Where megatron-core has its process groups; None if it has none: others mark parameters as it does."""
    state = sys.modules.get("megatron.core.parallel_state")
    return state if state is not None and state.model_parallel_is_initialized() else None


def supposed(rank: int, world: int) -> list[Axis]:
    """The axes of a model of which nothing says how the job distributes it."""
    return [Axis("dp", rank, world, SUPPOSED, tuple(range(world)))] if world > 1 else []


def group_ranks(group: Any) -> tuple[int, ...]:
    """The global ranks of a process group, in its order."""
    return tuple(sys.modules["torch.distributed"].get_process_group_ranks(group))


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
        cells.append({first - min(here) + step for step in here} & left)
        left -= cells[-1]
    index = next(i for i, cell in enumerate(cells) if rank in cell)
    return [Axis("rest", index, len(cells), OTHER, tuple(sorted(min(cell) for cell in cells)))]
