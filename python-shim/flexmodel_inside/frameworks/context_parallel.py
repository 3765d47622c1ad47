"""Context parallelism of `torch.distributed.tensor.experimental`: which pieces of sequences this process has.

The job gives torch the tensors to cut. Those, and what the model makes of them, are known by their shapes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from .._bridge import PLACEMENT_HEAD_TAIL as HEAD_TAIL
from .._bridge import PLACEMENT_SHARD as SHARD
from .._bridge import PLACEMENT_UNKNOWN as UNKNOWN
from ..layouts import AxisPlacement
from ..mesh import CONTEXT, Axis
from ..patches import follow, given
from .adapter import Adapter, Job, ModelFacts
from .device_mesh import axes_of_root

_MODULE = "torch.distributed.tensor.experimental._context_parallel._attention"
# How a load balancer of torch's orders the pieces.
_ORDERS = {"NoneType": SHARD, "_HeadTailLoadBalancer": HEAD_TAIL}


class Cut(NamedTuple):
    """A piece of every sequence, as this process has it while context parallelism is on."""

    axis: Axis
    place: int
    # Of the piece.
    length: int
    # Sizes of the batch, where what is cut has one, and the dimensions in which the job cuts its tensors.
    batches: frozenset[int]
    dims: frozenset[int]

    def of(self, shape: torch.Size) -> AxisPlacement | None:
        """How a tensor of this shape lies, if no two of its dimensions may be the one that is cut."""
        dims = [dim for dim, n in enumerate(shape) if n == self.length and (dim or 0 in self.dims)]
        if len(dims) != 1 or dims[0] not in self.dims or (dims[0] and shape[0] not in self.batches):
            return None
        return self.axis.placed(self.place, dims[0])


class ContextParallel(Adapter):
    """Follows what is cut, and for how long."""

    imports = (_MODULE,)

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self._cut: Cut | None = None

    def watches(self) -> list[tuple[Sequence[str], Callable[[], object]]]:
        return [((_MODULE,), self._follow)]

    def _follow(self) -> None:
        """Every way into context parallelism goes through these functions, and out of it."""
        module: Any = sys.modules[_MODULE]
        names = ("_context_parallel_buffers", "_disable_context_parallel_dispatcher_impl")
        if not all(hasattr(module, name) for name in names):
            return  # of another torch: nothing is known then

        def sharded(pieces: Any, *call: Any) -> None:
            # (mesh, buffers, buffer_seq_dims, load_balancer=None)
            mesh, dims = given(*call, 0, "mesh"), given(*call, 2, "buffer_seq_dims")
            self._enter(mesh, list(pieces), list(dims), given(*call, 3, "load_balancer"))

        follow(module, names[0], self.job.guard, after=sharded)
        follow(module, names[1], self.job.guard, before=lambda *_: self._leave())

    def _enter(self, mesh: Any, pieces: list[Any], dims: list[int], balancer: Any) -> None:
        self._leave()
        axis, is_new = self.job.meshes.cut_along(mesh)
        if axis is None:
            return
        place = _ORDERS.get(type(balancer).__name__, UNKNOWN)
        lengths, batches, cut = set(), set(), set()
        for piece, dim in zip(pieces, dims, strict=True):
            if not isinstance(piece, torch.Tensor):
                continue
            dim %= piece.dim()
            # Torch cuts by a DTensor, which knows nothing of the order.
            self.job.layouts.note(piece, [axis.placed(place, dim)])
            lengths.add(piece.size(dim))
            cut.add(dim)
            if dim:
                batches.add(piece.size(0))
        if len(lengths) == 1:
            self._cut = Cut(axis, place, lengths.pop(), frozenset(batches), frozenset(cut))
        if is_new:
            self.job.changed()

    def _leave(self) -> None:
        self._cut = None

    def conclude(self, model: ModelFacts) -> None:
        """The axes over which the job cuts sequences, and those of the meshes that these are of."""
        for mesh in self.job.meshes.cut_meshes():
            model.axes += self.job.meshes.axes_of(mesh, CONTEXT)
            model.axes += axes_of_root(self.job, mesh)

    def placement_by_shape(self, shape: torch.Size) -> AxisPlacement | None:
        return None if self._cut is None else self._cut.of(shape)
