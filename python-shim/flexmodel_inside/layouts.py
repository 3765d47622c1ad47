"""How a tensor lies over the ranks: as a framework says or, of a local tensor, as what it was made from did."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from ._bridge import PLACEMENT_UNKNOWN as UNKNOWN
from ._bridge import PLACEMENTS_OF_PIECES as _PIECES
from .naming import is_instance

if TYPE_CHECKING:
    from .frameworks import Frameworks

# An axis's name, this process's index and the size of the axis; the place and, of a shard, the dimension.
AxisPlacement = tuple[str, int, int, int, int]


class Layouts:
    """Knows the layout of tensors of the frameworks' classes, and of tensors that are known to be parts of one."""

    def __init__(self) -> None:
        # Who is asked, set by themselves.
        self.frameworks: Frameworks
        # Local tensors, for as long as they live.
        self._local: Any = WeakTensorKeyDictionary()

    def note(self, local: torch.Tensor, axes: list[AxisPlacement]) -> None:
        """How a tensor lies, for as long as it lives."""
        self._local[local] = axes
        # Other views will be of the same base.
        base = local._base
        of_base = None if base is None else _in_view(base, local, axes)
        if of_base is not None:
            self._local[base] = of_base

    def describe(
        self, tensor: torch.Tensor, module: nn.Module | None = None, like: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, list[AxisPlacement]] | None:
        """The part of `tensor` that this process holds, and how it lies along each axis of which that is known,
        outermost first; None if nothing is known.

        `module` is given the tensor or, where `like` is what it was given first, gives it. In a graph that is traced,
        the module is not known, and `like` only where it has no parameters.
        """
        with torch._C.DisableTorchFunction():  # what the job's classes of tensors do is no matter here
            return self._described(tensor, module, like)

    def _described(
        self, tensor: torch.Tensor, module: nn.Module | None, like: torch.Tensor | None
    ) -> tuple[torch.Tensor, list[AxisPlacement]] | None:
        stated = self.frameworks.decided("placement", tensor)
        if stated is not NotImplemented:
            return None if stated is None else (stated[0], self._with_shape(tensor.shape, stated[1]))
        part = waited_for(tensor)
        known = self._known(tensor)
        if known is None:
            if module is not None:
                known = self.frameworks.first("placement_by_module", part, module, like is None)
            # What a module makes of a piece is such a piece too, if it is of the same shape.
            if known is None and like is not None:
                known = self._pieces_like(part, like)
            if known is not None:
                self._local[tensor] = known
        axes = self._with_shape(part.shape, known or [])
        return None if not axes and part is tensor else (part, axes)

    def _with_shape(self, shape: torch.Size, axes: list[AxisPlacement]) -> list[AxisPlacement]:
        """Adds what the shape alone says, outermost, if that is of an axis of which nothing is known yet."""
        cut = self.frameworks.first("placement_by_shape", shape)
        return axes if cut is None or any(axis[0] == cut[0] for axis in axes) else [cut, *axes]

    def _known(self, tensor: torch.Tensor) -> list[AxisPlacement] | None:
        known = self._local.get(tensor)
        base = tensor._base if known is None else None
        axes = self._local.get(base) if base is not None else None
        if axes is None:
            return known
        return _in_view(tensor, base, axes)

    def _pieces_like(self, tensor: torch.Tensor, like: torch.Tensor) -> list[AxisPlacement] | None:
        described = self.describe(like)
        axes = described[1] if described is not None else []
        if described is None or not axes or any(axis[3] != UNKNOWN and not _is_piece(axis[3]) for axis in axes):
            return None
        return axes if described[0].shape == tensor.shape else None


def waited_for(tensor: torch.Tensor) -> torch.Tensor:
    """What a tensor stands for whose collective may still be under way."""
    if is_instance(tensor, "torch.distributed._functional_collectives", "AsyncCollectiveTensor"):
        return tensor.trigger_wait()  # type: ignore[attr-defined]
    return tensor


def _is_piece(place: int) -> bool:
    """Whether a placement is that of a piece of one dimension."""
    return bool(_PIECES >> place & 1)


def _in_view(view: torch.Tensor, base: torch.Tensor, axes: list[AxisPlacement]) -> list[AxisPlacement] | None:
    """How a view of all of `base` lies, if `base` lies so: the dimension that is cut is the outermost of those into
    which a dimension of the base went, as its stride tells."""
    sizes = (*view.shape, *view.stride(), *base.shape, *base.stride())
    # Whoever compares a size that torch.compile does not know fixes it in the graph.
    if any(isinstance(n, torch.SymInt) for n in sizes) or view.numel() != base.numel() or view.numel() == 0:
        return None
    out = []
    for name, index, size, place, dim in axes:
        if _is_piece(place):
            extent = base.stride(dim) * base.size(dim)
            # More than one where a dimension of size 1 stands for heads, say, of which a rank has one.
            inside = [d for d in range(view.dim()) if view.stride(d) * view.size(d) == extent]
            if len(inside) != 1 or view.stride(inside[0]) < base.stride(dim):
                return None
            dim = inside[0]
        out.append((name, index, size, place, dim))
    return out
