"""`fully_shard`: parameters are DTensors that the module's own state keeps."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

from torch import nn

from .._bridge import KIND_GRAD_UNCLIPPED, KIND_PARAM
from .._bridge import PLACEMENT_PARTIAL as PARTIAL
from .._bridge import PLACEMENT_UNKNOWN as UNKNOWN
from ..mesh import DATA, Axis
from ..naming import authored, is_instance
from ..parameters import Parameter, Piece, detached
from .adapter import Adapter, ModelFacts

_MODULE, _CLASS = "torch.distributed.fsdp", "FSDPModule"


class Fsdp2(Adapter):
    """The axes of the mesh that it was given."""

    imports = (_MODULE,)
    subclass_prefixes = ("FSDP",)

    def see(self, module: nn.Module, model: ModelFacts) -> None:
        if not is_instance(module, _MODULE, _CLASS):
            return
        model.wrapped("FSDP2")
        model.reduces = True
        groups = _groups(module)
        for group in groups:
            model.meshes.append(group.mesh_info.mesh)
            model.axes += self.job.meshes.axes_of(group.mesh_info.mesh, DATA)
        for group in groups if model.with_parameters else ():
            model.shards.update(self._parameters(group))

    def _parameters(self, group: Any) -> Iterator[tuple[tuple[int, str], Parameter]]:
        for fsdp_param in group.fsdp_params:
            info = fsdp_param._module_info
            axes = self.job.meshes.axes_of(group.mesh_info.mesh, DATA)
            parameter = self._sharded(weakref.ref(fsdp_param), axes)
            places = [(info.module, info.param_name), *zip(info.shared_modules, info.shared_param_names, strict=True)]
            for module, name in places:
                yield (id(authored(module)), name), parameter

    def _sharded(self, where: Any, axes_of_batch: list[Axis]) -> Parameter:
        def sharded() -> Any:
            fsdp_param = where()
            return None if fsdp_param is None else fsdp_param.sharded_param

        def read(kind: int) -> Piece | None:
            value = sharded()
            value = value.grad if kind != KIND_PARAM and value is not None else value
            addend = _unreduced(where()) if kind == KIND_GRAD_UNCLIPPED else None
            if value is None and addend is None:
                return None
            if addend is None:
                local, axes = self.job.layouts.describe(value) or (value, [])
                return detached(local), axes
            local, axes = self.job.layouts.describe(addend) or (addend, [])
            # Beside what was reduced before, it is no addend of the whole.
            place = PARTIAL if value is None else UNKNOWN
            return detached(local), [*(axis.placed(place) for axis in axes_of_batch), *axes]

        return Parameter(read, lambda held: id(sharded()) in held)


def _unreduced(fsdp_param: Any) -> Any:
    """The gradient of the whole parameter that this rank has, and that is yet to be reduced; None if there is none."""
    accumulated = getattr(fsdp_param, "unsharded_accumulated_grad", None)
    if accumulated is not None:
        return accumulated
    return getattr(getattr(fsdp_param, "_unsharded_param", None), "grad", None)


def _groups(module: Any) -> list[Any]:
    """What is sharded together of a module: an `FSDPParamGroup` or, from torch 2.12 on, several."""
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    return list(groups) if groups is not None else [g for g in [state._fsdp_param_group] if g is not None]
