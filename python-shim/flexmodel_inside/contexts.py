"""Context parallelism of `torch.distributed.tensor.experimental`: which pieces of sequences this process has.

The job gives torch the tensors to cut. Those, and what the model makes of them, are told by their shapes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from .layouts import HEAD_TAIL, SHARD, UNKNOWN, Cut, Layouts
from .mesh import Meshes
from .patches import follow, given

MODULE = "torch.distributed.tensor.experimental._context_parallel._attention"


class Contexts:
    """Follows what is cut, and for how long."""

    def __init__(self, meshes: Meshes, layouts: Layouts, on_change: Callable[[], None]) -> None:
        self._meshes = meshes
        self._layouts = layouts
        # Told that an axis has become known, which models may be distributed over.
        self._on_change = on_change

    def watch(self, guard: Callable[..., Any]) -> None:
        """Follow the functions that every way into context parallelism goes through, and out of it.

        Their module must be imported.
        """
        module: Any = sys.modules[MODULE]
        shard = getattr(module, "_context_parallel_buffers", None)
        leave = getattr(module, "_disable_context_parallel_dispatcher_impl", None)
        if shard is None or leave is None:
            return  # of another torch: what nobody tells is not known

        def sharded(pieces: Any, *call: Any) -> None:
            # (mesh, buffers, buffer_seq_dims, load_balancer=None)
            mesh, dims = given(*call, 0, "mesh"), given(*call, 2, "buffer_seq_dims")
            self._enter(mesh, list(pieces), list(dims), given(*call, 3, "load_balancer"))

        follow(module, "_context_parallel_buffers", guard, after=sharded)
        follow(module, "_disable_context_parallel_dispatcher_impl", guard, before=lambda *_: self._over())

    def _enter(self, mesh: Any, pieces: list[Any], dims: list[int], balancer: Any) -> None:
        self._over()
        axis, news = self._meshes.context_of(mesh)
        if axis is None:
            return
        orders = {"NoneType": SHARD, "_HeadTailLoadBalancer": HEAD_TAIL}
        place = orders.get(type(balancer).__name__, UNKNOWN)
        lengths, batches, cut = set(), set(), set()
        for piece, dim in zip(pieces, dims, strict=True):
            if not isinstance(piece, torch.Tensor):
                continue
            dim %= piece.dim()
            # Torch cuts by a DTensor, which knows nothing of the order.
            self._layouts.note(piece, [(axis.name, axis.index, axis.size, place, dim)])
            lengths.add(piece.size(dim))
            cut.add(dim)
            if dim:
                batches.add(piece.size(0))
        if len(lengths) == 1:
            facts = (axis.name, axis.index, axis.size, place, lengths.pop(), frozenset(batches), frozenset(cut))
            self._layouts.cut = Cut(*facts)
        if news:
            self._on_change()

    def _over(self) -> None:
        self._layouts.cut = None
