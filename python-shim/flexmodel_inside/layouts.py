"""How a tensor lies over the ranks, where torch knows: DTensors, and local tensors that were made from them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from ._bridge import PLACEMENT_HEAD_TAIL as HEAD_TAIL
from ._bridge import PLACEMENT_PARTIAL as PARTIAL
from ._bridge import PLACEMENT_REPLICATE as REPLICATE
from ._bridge import PLACEMENT_SHARD as SHARD
from ._bridge import PLACEMENT_UNKNOWN as UNKNOWN
from .mesh import TENSOR, Meshes, megatron_state
from .naming import stored
from .patches import follow, given
from .wrappers import is_instance, is_megatron

# Places of a piece of one dimension.
_PIECES = (SHARD, HEAD_TAIL)

# An axis's name, this process's index and the size of the axis; the place and, of a shard, the dimension.
Leaf = tuple[str, int, int, int, int]

MODULE = "torch.distributed.tensor"


class Cut(NamedTuple):
    """A piece of every sequence, as this process has it while context parallelism is on."""

    # The axis, this process's index on it, and its size.
    axis: str
    index: int
    size: int
    place: int
    # Of the piece.
    length: int
    # Sizes of the batch, where what is cut has one, and the dimensions in which the job cuts its tensors.
    batches: frozenset[int]
    dims: frozenset[int]

    def of(self, shape: torch.Size) -> Leaf | None:
        """How a tensor of this shape lies, if no two of its dimensions may be the one that is cut."""
        dims = [dim for dim, n in enumerate(shape) if n == self.length and (dim or 0 in self.dims)]
        if len(dims) != 1 or dims[0] not in self.dims or (dims[0] and shape[0] not in self.batches):
            return None
        return self.axis, self.index, self.size, self.place, dims[0]


class Layouts:
    """Knows the layout of DTensors, and of tensors that are known to be parts of one."""

    def __init__(self, meshes: Meshes) -> None:
        self._meshes = meshes
        # Local tensors, for as long as they live. A hook of a tensor-parallel style turns a module's output into one.
        self._local: Any = WeakTensorKeyDictionary()
        # How context parallelism cuts sequences now.
        self.cut: Cut | None = None

    def watch(self, guard: Callable[..., Any]) -> None:
        """Note what DTensors are turned into. Their class must be imported."""

        def to_local(local: torch.Tensor, *call: Any) -> None:
            if not torch.compiler.is_dynamo_compiling():
                axes = self.of_spec(given(*call, 0, "self")._spec)
                if axes is not None:
                    self.note(local, axes)

        follow(sys.modules[MODULE].DTensor, "to_local", guard, after=to_local)  # type: ignore[attr-defined]

    def note(self, local: torch.Tensor, axes: list[Leaf]) -> None:
        """How a tensor lies, for as long as it lives."""
        self._local[local] = axes
        # Other views will be of the same base.
        base = local._base
        of_base = None if base is None else _in_view(base, local, axes)
        if of_base is not None:
            self._local[base] = of_base

    def describe(
        self, tensor: torch.Tensor, module: nn.Module | None = None, like: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, list[Leaf]] | None:
        """The part of `tensor` that this process holds, and how it lies along each axis of which that is known,
        outermost first; None if nothing is known.

        `module` is given the tensor or, where `like` is what it was given first, gives it. In a graph that is traced,
        the module is not known, and `like` only where it has no parameters.
        """
        with torch._C.DisableTorchFunction():  # what the job's classes of tensors do is no matter here
            return self._described(tensor, module, like)

    def _described(
        self, tensor: torch.Tensor, module: nn.Module | None, like: torch.Tensor | None
    ) -> tuple[torch.Tensor, list[Leaf]] | None:
        if is_instance(tensor, MODULE, "DTensor"):
            axes = self.of_spec(tensor._spec)
            return None if axes is None else (_there(tensor._local_tensor), self._with_cut(tensor.shape, axes))
        part = _there(tensor)
        known = self._known(tensor)
        if known is None:
            known = self._by_module(part, module, like is None) if module is not None else None
            # What a module makes of a piece is such a piece too, if it is of the same shape.
            if known is None and like is not None:
                known = self._pieces_like(part, like)
            if known is not None:
                self._local[tensor] = known
        axes = self._with_cut(part.shape, known or [])
        return None if not axes and part is tensor else (part, axes)

    def _with_cut(self, shape: torch.Size, axes: list[Leaf]) -> list[Leaf]:
        cut = self.cut and self.cut.of(shape)
        return axes if cut is None or any(axis[0] == cut[0] for axis in axes) else [cut, *axes]

    def _by_module(self, tensor: torch.Tensor, module: nn.Module, given: bool) -> list[Leaf] | None:
        """Where a module says that it is given, or gives, pieces."""
        weight = stored(module).get("weight")
        if is_instance(weight, MODULE, "DTensor") and isinstance(module, (nn.Linear, nn.Embedding)):
            return self._of_features(tensor, weight, 1 if given or isinstance(module, nn.Embedding) else 0)
        dim = _megatron_cuts(tensor, module, given)
        group = None if dim is None else _megatron_group(module)
        if group is None:
            return None
        axis = self._meshes.axis_of_group(group, "tp", TENSOR)
        return [(axis.name, axis.index, axis.size, SHARD, dim)]

    def _of_features(self, tensor: torch.Tensor, weight: Any, dim: int) -> list[Leaf] | None:
        """The last dimension is cut as dimension `dim` of the weight is, if it is as long as that piece."""
        axes = self.of_spec(weight._spec) or []
        cut = any(place == SHARD and d == dim for _, _, _, place, d in axes)
        if not cut or tensor.dim() == 0 or not weight._local_tensor.size(dim) == tensor.size(-1) < weight.size(dim):
            return None
        last = tensor.dim() - 1
        return [(n, i, s, SHARD, last) if (p, d) == (SHARD, dim) else (n, i, s, UNKNOWN, 0) for n, i, s, p, d in axes]

    def _known(self, tensor: torch.Tensor) -> list[Leaf] | None:
        known = self._local.get(tensor)
        base = tensor._base if known is None else None
        axes = self._local.get(base) if base is not None else None
        if axes is None:
            return known
        return _in_view(tensor, base, axes)

    def _pieces_like(self, tensor: torch.Tensor, like: torch.Tensor) -> list[Leaf] | None:
        described = self.describe(like)
        axes = described[1] if described is not None else []
        if described is None or not axes or any(axis[3] not in (*_PIECES, UNKNOWN) for axis in axes):
            return None
        return axes if described[0].shape == tensor.shape else None

    def of_spec(self, spec: Any) -> list[Leaf] | None:
        """The layout that a `DTensorSpec` says; None if this process is not on its mesh, or cannot tell where."""
        axes = self._meshes.axes_of(spec.mesh)
        if len(axes) != len(spec.placements):
            return None
        described = [(axis, *_place(placement)) for axis, placement in zip(axes, spec.placements, strict=True)]
        # A strided shard lies inside of the shards of the same dimension that come after it in the mesh.
        described.sort(key=lambda entry: entry[3])
        return [(axis.name, axis.index, axis.size, place, dim) for axis, place, dim, _ in described]


def _megatron_group(module: nn.Module) -> Any:
    """The process group of megatron-core's tensor parallelism; None if it has none."""
    group = getattr(module, "tp_group", None)
    if group is not None:
        return group
    state = megatron_state()
    return None if state is None else state.get_tensor_model_parallel_group()


def _megatron_cuts(tensor: torch.Tensor, module: nn.Module, given: bool) -> int | None:
    """The dimension of which megatron-core's module is given, or gives, a piece."""
    if is_megatron(module, "ColumnParallelLinear"):
        if given:
            return 0 if module.sequence_parallel else None
        return None if module.gather_output else tensor.dim() - 1
    if is_megatron(module, "RowParallelLinear"):
        if given:
            return tensor.dim() - 1 if module.input_is_parallel else None
        return 0 if module.sequence_parallel and tensor.dim() > 1 else None
    if is_megatron(module, "VocabParallelEmbedding"):
        return 0 if not given and module.reduce_scatter_embeddings else None
    # A mark of megatron's on the parameters of modules between its layers.
    marked = any(getattr(p, "sequence_parallel", False) for p in stored(module).values())
    return 0 if marked and tensor.dim() > 1 else None


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
    """How a view of all of `base` lies, if `base` lies so: the dimension that is cut is the outermost of those into
    which a dimension of the base went, told by its stride."""
    sizes = (*view.shape, *view.stride(), *base.shape, *base.stride())
    # Whoever compares a size that torch.compile does not know fixes it in the graph.
    if any(isinstance(n, torch.SymInt) for n in sizes) or view.numel() != base.numel() or view.numel() == 0:
        return None
    out = []
    for name, index, size, place, dim in axes:
        if place in _PIECES:
            extent = base.stride(dim) * base.size(dim)
            # More than one where a dimension of size 1 stands for heads, say, of which a rank has one.
            inside = [d for d in range(view.dim()) if view.stride(d) * view.size(d) == extent]
            if len(inside) != 1 or view.stride(inside[0]) < base.stride(dim):
                return None
            dim = inside[0]
        out.append((name, index, size, place, dim))
    return out
