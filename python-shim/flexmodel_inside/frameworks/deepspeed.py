"""DeepSpeed's engine: its axis, its loss scale, the steps that it skips, and where it keeps parameters and gradients.

| stage | a parameter | its gradient |
|---|---|---|
| 0, fp16 | whole, in the module | whole, in what the inner optimizer has: of a parameter, or of a group flattened |
| 1, 2 | whole, in the module | a run, in the flat partition that the inner optimizer has |
| 3 | a run, in `ds_tensor` | as above |

Where a step is skipped, the inner optimizer has been given nothing. What it would have been given is still in its
place: in the parameters in stage 0, and in `averaged_gradients`, or in the partitions of offloaded optimizers.
"""

from __future__ import annotations

import functools
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
from .adapter import Adapter, Job, ModelFacts

_MODULE, _CLASS = "deepspeed.runtime.engine", "DeepSpeedEngine"
# Its optimizers that skip steps, and the method that each calls then, before it forgets gradients.
_SKIPPING = (
    ("deepspeed.runtime.bf16_optimizer", "BF16_Optimizer", "clear_hp_grads"),
    ("deepspeed.runtime.fp16.fused_optimizer", "FP16_Optimizer", "_update_scale"),
    ("deepspeed.runtime.fp16.unfused_optimizer", "FP16_UnfusedOptimizer", "_update_scale"),
    ("deepspeed.runtime.zero.stage_1_and_2", "DeepSpeedZeroOptimizer", "_update_scale"),
    ("deepspeed.runtime.zero.stage3", "DeepSpeedZeroOptimizer_Stage3", "_update_scale"),
)
# Attributes of its optimizers with all that the inner one has; flat, but for the last.
_HELD = (
    "single_partition_of_fp32_groups",
    "fp32_groups_flat_partition",
    "fp32_partitioned_groups_flat",
    "fp32_groups_flat",
    "fp32_groups",
)


class DeepSpeed(Adapter):
    """One axis, of the engine's data parallel group."""

    imports = (_MODULE,)
    wrappers = ((_MODULE, _CLASS),)

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        # The optimizer that steps, until it is known whether it skips that.
        self._stepping: weakref.ref[Any] | None = None
        # The optimizer that is about to forget the gradients that it skips, and what was made of these, by group.
        self._skipping: Any = None
        self._made: dict[int, torch.Tensor | None] = {}
        # By optimizer, what `_positions` says.
        self._positions: Any = weakref.WeakKeyDictionary()

    def watches(self) -> list[tuple[Sequence[str], Callable[[], object]]]:
        skips = [self._skips_of(*where) for where in _SKIPPING]
        return [((_MODULE,), self._follow), *skips]

    def _skips_of(self, module: str, name: str, method: str) -> tuple[Sequence[str], Callable[[], object]]:
        def follow_skips() -> None:
            cls = getattr(sys.modules[module], name, None)
            # Other releases have other ones; their steps are counted, and none is known to be skipped.
            if not (hasattr(cls, "step") and hasattr(cls, method)):
                return
            follow(cls, "step", self.job.guard, before=self._step)
            follow(cls, method, self.job.guard, before=self._skip)
            if hasattr(cls, "initialize_optimizer_states"):
                self.job.clock.makes_states(cls, "initialize_optimizer_states")

        return (module,), follow_skips

    def _step(self, *call: Any) -> None:
        self._stepping = weakref.ref(given(*call, 0, "self"))

    def _skip(self, *call: Any) -> None:
        """An optimizer knows whether it skips a step, and has its gradients yet."""
        optimizer, stepping, self._stepping = given(*call, 0, "self"), self._stepping, None
        if stepping is None or stepping() is not optimizer or not getattr(optimizer, "overflow", False):
            return
        held = {id(each) for group in _all_held(optimizer) for each in group}
        scale = getattr(optimizer, "loss_scale", None)
        self._skipping, self._made = optimizer, {}
        try:
            self.job.clock.skipped_step(optimizer.optimizer, held, None if scale is None else float(scale))
        finally:
            self._skipping, self._made = None, {}

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
            divisor = engine.gradient_accumulation_steps() if divided else 1
            self.job.loss_scale(self.job.scale(scale, divisor))

        follow(cls, "__init__", self.job.guard, after=made)
        follow(cls, "backward", self.job.guard, before=backward, after=lambda *_: self.job.unscaled())

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
        if kind != KIND_GRAD:
            return NotImplemented
        flats = None if self._master(parameter, model) is not None else self.held_as(parameter, model)
        if flats is None:
            return NotImplemented
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is None and flats and self._is_skipping(model):
            gradient: torch.Tensor | None = flats[0]  # none of it, since others have this parameter
        else:
            gradient = self._gradient_of(parameter, model, flats)
        if gradient is None or not parameter.requires_grad:
            return None
        group = getattr(parameter, "_dp_group", None) or _engine(model).data_parallel_group
        axis = self.job.meshes.axis_of_group(group, "dp", DATA)
        placed = [flat_placement(axis, tuple(parameter.shape))]
        if mapping is None:
            return gradient.detach()[:0], placed
        address = mapping.hp_fragment_address
        return gradient.detach()[address.start : address.start + address.numel], placed

    def _is_skipping(self, model: ModelFacts) -> bool:
        """Its optimizer is about to forget the gradients that it skips."""
        return self._skipping is not None and self._skipping is _engine(model).optimizer

    def _master(self, parameter: torch.Tensor, model: ModelFacts) -> tuple[torch.Tensor, int] | None:
        """What the inner optimizer has for a parameter that is whole on each rank, if it does not have that itself."""
        optimizer = getattr(_engine(model), "optimizer", None)
        if optimizer is None:
            return None
        if optimizer not in self._positions:
            self._positions[optimizer] = _positions(optimizer)
        return self._positions[optimizer].get(id(parameter))

    def gradient_in_copy(self, parameter: torch.Tensor, model: ModelFacts) -> torch.Tensor | None:
        master = self._master(parameter, model)
        if master is None:
            return None
        copy, start = master
        if self._is_skipping(model):
            return None if parameter.grad is None else parameter.grad.to(copy.dtype)
        return (
            None if copy.grad is None else copy.grad.reshape(-1)[start : start + parameter.numel()].view_as(parameter)
        )

    def _gradient_of(self, parameter: Any, model: ModelFacts, flats: list[torch.Tensor]) -> torch.Tensor | None:
        """The gradient of the partition that has some of a parameter."""
        found = next((flat.grad for flat in flats if flat.grad is not None), None)
        if found is not None or not self._is_skipping(model) or len(flats) != 1:
            return found
        groups = next(groups for groups in map(functools.partial(_of, self._skipping), _HELD) if groups is not None)
        index = next(at for at, flat in enumerate(groups) if flat is flats[0])
        if index not in self._made:
            of_group = _of(self._skipping, "averaged_gradients") or {}
            flats_of_groups = _of(self._skipping, "fp32_groups_gradient_flat_partition") or []
            pieces = of_group.get(index) or flats_of_groups[index : index + 1]
            flat = torch.cat([piece.detach().reshape(-1) for piece in pieces]) if pieces else None
            self._made[index] = None if flat is None else flat.to(flats[0].dtype)
        return self._made[index]

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
        gradient = self._gradient_of(parameter, model, flats)
        return None if gradient is None else (gradient.detach()[start : start + length], placed)

    def held_as(self, parameter: torch.Tensor, model: ModelFacts) -> list[torch.Tensor] | None:
        """The flat partitions in the inner optimizer that have some of a parameter on this rank, or all of them where
        other ranks have the parameter; None where that optimizer has parameters themselves."""
        master = self._master(parameter, model)
        if master is not None:
            return [master[0]]
        optimizer = getattr(_engine(model), "optimizer", None)
        for name in _HELD[:2]:
            flats = getattr(optimizer, name, None)
            if flats is not None:
                mapping = getattr(parameter, "_hp_mapping", None)
                return list(flats) if mapping is None else [flats[mapping.param_group_index]]
        flats = getattr(optimizer, _HELD[2], None)
        if flats is None:
            return None
        position = optimizer.grad_position.get(optimizer.get_param_id(parameter))  # type: ignore[union-attr]
        return [] if position is None else [flats[position[0]]]


def _of(optimizer: Any, name: str) -> Any:
    return getattr(optimizer, name, None)


def _all_held(optimizer: Any) -> list[list[torch.Tensor]]:
    """All that the inner optimizer has, by group."""
    groups = next((groups for groups in (_of(optimizer, name) for name in _HELD) if groups is not None), [])
    return [list(group) if isinstance(group, (list, tuple)) else [group] for group in groups]


def _positions(optimizer: Any) -> dict[int, tuple[torch.Tensor, int]]:
    """Where stage 0 has copies for the inner optimizer: by a parameter's id that copy, which may be of a whole group,
    and where the parameter begins in it."""
    found: dict[int, tuple[torch.Tensor, int]] = {}
    flat, apart = (_of(optimizer, name) for name in _HELD[3:])
    for at, group in enumerate(_of(optimizer, "fp16_groups") or () if flat is not None or apart is not None else ()):
        start = 0
        for number, parameter in enumerate(group):
            found[id(parameter)] = (flat[at], start) if flat is not None else (apart[at][number], 0)
            start += parameter.numel()
    return found


def _engine(model: ModelFacts) -> Any:
    """The engine of a model; None if it has none, or it is destroyed."""
    where = model.notes.get(DeepSpeed)
    return None if where is None else where()
