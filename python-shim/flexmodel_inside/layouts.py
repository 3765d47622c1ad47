"""How a tensor lies over the ranks, where torch knows: DTensors, and local tensors that were made from them."""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from .mesh import Meshes
from .wrappers import is_instance

# Codes of wire::tap_abi::LeafPlace.
REPLICATE, SHARD, PARTIAL, UNKNOWN, FLAT = range(5)

# An axis's name, this process's index and the size of the axis; the place and, of a shard, the dimension.
Leaf = tuple[str, int, int, int, int]

MODULE = "torch.distributed.tensor"


class Layouts:
    """Knows the layout of DTensors, and of tensors that are known to be parts of one."""

    def __init__(self, meshes: Meshes) -> None:
        self._meshes = meshes
        # Local tensors, for as long as they live. A hook of a tensor-parallel style turns a module's output into one.
        self._local: Any = WeakIdKeyDictionary()

    def watch(self) -> None:
        """Note what DTensors are turned into. Their class must be imported."""
        cls = sys.modules[MODULE].DTensor  # type: ignore[attr-defined]
        original = cls.to_local
        layouts = self

        @functools.wraps(original)
        def to_local(self: Any, *args: Any, **kwargs: Any) -> Any:
            local = original(self, *args, **kwargs)
            if not torch.compiler.is_compiling():
                layouts._local[local] = layouts.of_spec(self._spec)
            return local

        cls.to_local = to_local

    def describe(self, tensor: torch.Tensor, like: torch.Tensor | None) -> tuple[torch.Tensor, list[Leaf]] | None:
        """The part of `tensor` that this process holds, and how it lies along each axis of which that is known, outermost
        first; None if nothing is known. What a module makes of a piece is such a piece too if it is of the same shape:
        `like` is what it was given first.
        """
        if is_instance(tensor, MODULE, "DTensor"):
            return _there(tensor._local_tensor), self.of_spec(tensor._spec)
        part = _there(tensor)
        known = self._known(tensor)
        if known is None and like is not None:
            known = self._pieces_like(part, like)
            if known is not None:
                self._local[tensor] = known
        if known is None:
            return None if part is tensor else (part, [])
        return part, known

    def _known(self, tensor: torch.Tensor) -> list[Leaf] | None:
        known = self._local.get(tensor)
        base = tensor._base if known is None else None
        axes = self._local.get(base) if base is not None else None
        if axes is None:
            return known
        return _in_view(tensor, base, axes)

    def _pieces_like(self, tensor: torch.Tensor, like: torch.Tensor) -> list[Leaf] | None:
        described = self.describe(like, None)
        if described is None or described[0].shape != tensor.shape:
            return None
        axes = described[1]
        return axes if axes and all(axis[3] in (SHARD, UNKNOWN) for axis in axes) else None

    def of_spec(self, spec: Any) -> list[Leaf]:
        """The layout that a `DTensorSpec` says."""
        axes = self._meshes.axes_of(spec.mesh)
        described = [(axis, *_place(placement)) for axis, placement in zip(axes, spec.placements, strict=True)]
        # A strided shard lies inside of the shards of the same dimension that come after it in the mesh.
        described.sort(key=lambda entry: entry[3])
        return [(axis.name, axis.index, axis.size, place, dim) for axis, place, dim, _ in described]


def _place(placement: Any) -> tuple[int, int, bool]:
    """Place, dimension, and whether the shard is strided, of a `Placement`."""
    kind = type(placement).__name__
    if kind == "Replicate":
        return REPLICATE, 0, False
    if kind in ("Shard", "_StridedShard"):
        return SHARD, placement.dim, kind != "Shard"
    # What a `_MaskPartial` holds is masked only when it is reduced.
    if kind == "Partial" and placement.reduce_op == "sum":
        return PARTIAL, 0, False
    return UNKNOWN, 0, False


def _there(tensor: torch.Tensor) -> torch.Tensor:
    """What a tensor stands for whose collective may still be under way."""
    if is_instance(tensor, "torch.distributed._functional_collectives", "AsyncCollectiveTensor"):
        return tensor.trigger_wait()  # type: ignore[attr-defined]
    return tensor


def _in_view(view: torch.Tensor, base: torch.Tensor, axes: list[Leaf]) -> list[Leaf] | None:
    """How a view of all of `base` lies, if `base` lies so: the dimension that is cut is the outermost of those into which
    a dimension of the base went, told by its stride."""
    if view.numel() != base.numel() or view.numel() == 0:
        return None
    out = []
    for name, index, size, place, dim in axes:
        if place == SHARD:
            extent = base.stride(dim) * base.size(dim)
            inside = [d for d in range(view.dim()) if view.size(d) > 1 and view.stride(d) * view.size(d) == extent]
            if len(inside) != 1 or view.stride(inside[0]) < base.stride(dim):
                return None
            dim = inside[0]
        out.append((name, index, size, place, dim))
    return out
