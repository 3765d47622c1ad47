"""DTensors, which say how they lie, and local tensors that were made from them."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from .._bridge import PLACEMENT_PARTIAL as PARTIAL
from .._bridge import PLACEMENT_REPLICATE as REPLICATE
from .._bridge import PLACEMENT_SHARD as SHARD
from .._bridge import PLACEMENT_UNKNOWN as UNKNOWN
from ..layouts import AxisPlacement, waited_for
from ..mesh import TENSOR
from ..naming import is_instance, stored
from ..patches import follow, given
from .adapter import Adapter, ModelFacts

_MODULE, _CLASS = "torch.distributed.tensor", "DTensor"


class DTensors(Adapter):
    """The axes of the meshes that parameters are on, and the layouts of tensors."""

    imports = (_MODULE,)

    def watches(self) -> list[tuple[Sequence[str], Callable[[], object]]]:
        return [((_MODULE,), self._follow)]

    def _follow(self) -> None:
        """Note what DTensors are turned into: a hook of a tensor parallel style does so with a module's output."""

        def to_local(local: torch.Tensor, *call: Any) -> None:
            if not torch.compiler.is_dynamo_compiling():
                axes = self._of_spec(given(*call, 0, "self")._spec)
                if axes is not None:
                    self.job.layouts.note(local, axes)

        follow(sys.modules[_MODULE].DTensor, "to_local", self.job.guard, after=to_local)  # type: ignore[attr-defined]

    def see(self, module: nn.Module, model: ModelFacts) -> None:
        meshes = model.notes.setdefault(DTensors, [])
        for name, parameter in stored(module).items():
            if is_instance(parameter, _MODULE, _CLASS):
                mesh = self.job.faults.of(f"the mesh of a parameter {name}", getattr, parameter, "device_mesh")
                if mesh is None:
                    model.is_known = False
                elif not any(mesh == other for other in meshes):
                    meshes.append(mesh)

    def conclude(self, model: ModelFacts) -> None:
        for mesh in model.notes.get(DTensors, ()):
            # A mesh of a wrapper is there already, with the role that the wrapper gave it.
            if not any(mesh == other for other in model.meshes):
                model.meshes.append(mesh)
                model.axes += self.job.meshes.axes_of(mesh, TENSOR)

    def placement(self, tensor: torch.Tensor) -> tuple[torch.Tensor, list[AxisPlacement]] | None:
        if not is_instance(tensor, _MODULE, _CLASS):
            return NotImplemented
        axes = self._of_spec(tensor._spec)  # type: ignore[attr-defined]
        return None if axes is None else (waited_for(tensor._local_tensor), axes)  # type: ignore[attr-defined]

    def placement_by_module(
        self, tensor: torch.Tensor, module: nn.Module, is_input: bool
    ) -> list[AxisPlacement] | None:
        """The last dimension of what a layer is given, or gives, is cut as its weight is, if it is as long as that
        piece."""
        weight: Any = stored(module).get("weight")
        if not is_instance(weight, _MODULE, _CLASS) or not isinstance(module, (nn.Linear, nn.Embedding)):
            return None
        dim = 1 if is_input or isinstance(module, nn.Embedding) else 0
        axes = self._of_spec(weight._spec) or []
        cut = any(place == SHARD and d == dim for _, _, _, place, d in axes)
        if not cut or tensor.dim() == 0 or not weight._local_tensor.size(dim) == tensor.size(-1) < weight.size(dim):
            return None
        last = tensor.dim() - 1
        return [(n, i, s, SHARD, last) if (p, d) == (SHARD, dim) else (n, i, s, UNKNOWN, 0) for n, i, s, p, d in axes]

    def _of_spec(self, spec: Any) -> list[AxisPlacement] | None:
        """The layout that a `DTensorSpec` says; None if this process is not on its mesh, or cannot tell where."""
        axes = self.job.meshes.axes_of(spec.mesh)
        if len(axes) != len(spec.placements):
            return None
        places = _places(spec.placements, [axis.size for axis in axes])
        described = [(axis, *place) for axis, place in zip(axes, places, strict=True)]
        # A strided shard lies inside of the shards of the same dimension that come after it in the mesh.
        described.sort(key=lambda entry: entry[3])
        return [axis.placed(place, dim) for axis, place, dim, _ in described]


def _places(placements: Sequence[Any], sizes: Sequence[int]) -> list[tuple[int, int, bool]]:
    """Place, dimension, and whether the shard is strided, of each `Placement` of one tensor.

    A strided shard is one of shards that come after it in the mesh, if there are as many of these as it says. What
    says something else interleaves pieces in another way: transformers' fused weights are cut block by block.
    """
    placed = [_place(placement) for placement in placements]
    odd = set()
    for at, (placement, (_, dim, is_strided)) in enumerate(zip(placements, placed, strict=True)):
        if is_strided:
            later = zip(sizes[at + 1 :], placed[at + 1 :], strict=True)
            if placement.split_factor != math.prod(size for size, other in later if other[:2] == (SHARD, dim)):
                odd.add(dim)
    return [(UNKNOWN, 0, False) if place == SHARD and dim in odd else (place, dim, s) for place, dim, s in placed]


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
