"""DeepSpeed's engine: its axis, its loss scale, and where ZeRO keeps parameters and gradients.

| stage | a parameter | its gradient |
|---|---|---|
| 1, 2 | whole, in the module | a run, in the flat partition that the inner optimizer has |
| 3 | a run, in `ds_tensor` | as above |
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from .._bridge import KIND_GRAD, KIND_GRAD_UNCLIPPED, KIND_PARAM
from ..mesh import DATA
from ..naming import is_instance
from ..parameters import ElsewhereError, Piece, flat_placement
from ..patches import follow, given
from .adapter import Adapter, ModelFacts

_MODULE, _CLASS = "deepspeed.runtime.engine", "DeepSpeedEngine"


class DeepSpeed(Adapter):
    """One axis, of the engine's data parallel group."""

    imports = (_MODULE,)
    wrappers = ((_MODULE, _CLASS),)

    def watches(self) -> list[tuple[Sequence[str], Callable[[], object]]]:
        return [((_MODULE,), self._follow)]

    def _follow(self) -> None:
        cls = sys.modules[_MODULE].DeepSpeedEngine  # type: ignore[attr-defined]

        def made(_: Any, *call: Any) -> None:
            # Known before it is called: others may be called first.
            self.job.meet(given(*call, 0, "self"))
            self.job.changed()

        def backward(*call: Any) -> None:
            # backward(self, loss, retain_graph=False, scale_wrt_gas=True)
            engine, divided = given(*call, 0, "self"), given(*call, 3, "scale_wrt_gas", True)
            scale = getattr(engine.optimizer, "loss_scale", None) or 1.0
            # It also divides the loss by the number of accumulation steps.
            self.job.loss_scale(float(scale) / (engine.gradient_accumulation_steps() if divided else 1))

        follow(cls, "__init__", self.job.guard, after=made)
        if self.job.wants_gradients():
            follow(cls, "backward", self.job.guard, before=backward, after=lambda *_: self.job.loss_scale(1.0))

    def see(self, module: nn.Module, model: ModelFacts) -> None:
        if not is_instance(module, _MODULE, _CLASS):
            return
        stage = getattr(module, "zero_optimization_stage", lambda: 0)()
        model.wrapped(f"DeepSpeed ZeRO-{stage}", replicated=True)
        model.notes.setdefault(DeepSpeed, weakref.ref(module))
        model.axes.append(self.job.meshes.axis_of_group(module.data_parallel_group, "dp", DATA))

    def read(self, parameter: torch.Tensor, kind: int, model: ModelFacts) -> Piece | None:
        if kind == KIND_GRAD_UNCLIPPED and _engine(model) is not None:
            raise ElsewhereError
        if hasattr(parameter, "ds_tensor"):
            return self._read_zero_3(parameter, kind, model)
        flats = self.held_as(parameter, model) if kind == KIND_GRAD else None
        if flats is None:
            return NotImplemented
        gradient = next((flat.grad for flat in flats if flat.grad is not None), None)
        if gradient is None or not parameter.requires_grad:
            return None
        group = getattr(parameter, "_dp_group", None) or _engine(model).data_parallel_group
        axis = self.job.meshes.axis_of_group(group, "dp", DATA)
        placed = [flat_placement(axis, tuple(parameter.shape))]
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is None:
            return gradient.detach()[:0], placed
        address = mapping.hp_fragment_address
        return gradient.detach()[address.start : address.start + address.numel], placed

    def _read_zero_3(self, parameter: Any, kind: int, model: ModelFacts) -> Piece | None:
        axis = self.job.meshes.axis_of_group(parameter.ds_process_group, "dp", DATA)
        own_part, placed = parameter.ds_tensor, [flat_placement(axis, tuple(parameter.ds_shape))]
        # The last partitions are padded.
        length = max(0, min(own_part.ds_numel, parameter.ds_numel - axis.index * own_part.ds_numel))
        if kind == KIND_PARAM:
            return own_part.detach().reshape(-1)[:length], placed
        flats = self.held_as(parameter, model)
        if not flats:
            return None
        optimizer = _engine(model).optimizer
        _, start, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
        gradient = flats[0].grad
        return None if gradient is None else (gradient.detach()[start : start + length], placed)

    def held_as(self, parameter: torch.Tensor, model: ModelFacts) -> list[torch.Tensor] | None:
        """The flat partitions in the inner optimizer that have some of a parameter on this rank, or all of them where
        other ranks have the parameter; None where that optimizer has parameters themselves."""
        optimizer = getattr(_engine(model), "optimizer", None)
        for name in ("single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
            flats = getattr(optimizer, name, None)
            if flats is not None:
                mapping = getattr(parameter, "_hp_mapping", None)
                return list(flats) if mapping is None else [flats[mapping.param_group_index]]
        flats = getattr(optimizer, "fp32_partitioned_groups_flat", None)
        if flats is None:
            return None
        position = optimizer.grad_position.get(optimizer.get_param_id(parameter))  # type: ignore[union-attr]
        return [] if position is None else [flats[position[0]]]


def _engine(model: ModelFacts) -> Any:
    """The engine of a model; None if it has none, or it is destroyed."""
    where = model.notes.get(DeepSpeed)
    return None if where is None else where()
