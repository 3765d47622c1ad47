"""megatron-core: its parallel layers and process groups; the schedules that run its stages and divide its losses; the
steps that its optimizers skip."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from .._bridge import KIND_GRAD_UNCLIPPED
from .._bridge import PLACEMENT_SHARD as SHARD
from ..layouts import AxisPlacement
from ..mesh import CONTEXT, DATA, PIPELINE, TENSOR
from ..naming import is_instance, stored
from ..orders import TURNED
from ..parameters import ElsewhereError, Piece
from ..patches import follow, given
from .adapter import Adapter, Job, ModelFacts, Stage

_STATE = "megatron.core.parallel_state"
_LAYERS = "megatron.core.tensor_parallel.layers"
_SCHEDULES = "megatron.core.pipeline_parallel.schedules"
_OPTIMIZER = "megatron.core.optimizer.optimizer"
_DISTRIBUTED = "megatron.core.optimizer.distrib_optimizer"
_SCALERS = "megatron.core.optimizer.grad_scaler"
_MAKES_STATES = "_init_optimizer_states_with_dummy_values"
# What runs the steps of a pipeline, and those of a model in one piece.
_PIPELINES = (
    "forward_backward_pipelining_without_interleaving",
    "forward_backward_pipelining_with_interleaving",
)
_WHOLE = "forward_backward_no_pipelining"
_GROUPS = (
    ("pipeline_model", "pp", PIPELINE),
    ("data", "dp", DATA),
    ("context", "cp", CONTEXT),
    ("tensor_model", "tp", TENSOR),
)


class Megatron(Adapter):
    """Its layers are known by their classes and by attributes, its groups by its own state."""

    imports = (_STATE,)
    wrappers = (
        ("megatron.core.distributed.distributed_data_parallel", "DistributedDataParallel"),
        ("megatron.core.transformer.module", "Float16Module"),
    )
    numbered = (("megatron.core.transformer.module", "MegatronModule"),)

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self._chunks: list[_Chunk] = []
        # Divisors and scales, by the optimizers whose scale never changes.
        self._constants: weakref.WeakKeyDictionary[Any, tuple[int, Any]] = weakref.WeakKeyDictionary()

    def watches(self) -> list[tuple[Sequence[str], Callable[[], object]]]:
        return [
            ((_SCHEDULES,), self._follow),
            ((_OPTIMIZER,), self._follow_skips),
            ((_DISTRIBUTED,), self._follow_states),
        ]

    def _follow_states(self) -> None:
        """Loading a checkpoint makes states to load into."""
        cls, name = getattr(sys.modules[_DISTRIBUTED], "DistributedOptimizer", None), _MAKES_STATES
        # Other releases have other ones.
        if hasattr(cls, name):
            self.job.clock.makes_states(cls, name)

    def _follow_skips(self) -> None:
        """An optimizer of more than one type skips a step whose gradients, unscaled by then, are not finite."""
        cls, name = getattr(sys.modules[_OPTIMIZER], "MixedPrecisionOptimizer", None), "prepare_grads"
        if not hasattr(cls, name):
            return

        def prepared(found_inf: bool, *call: Any) -> None:
            optimizer = given(*call, 0, "self").optimizer
            if found_inf and optimizer is not None:
                self.job.clock.skipped_step(optimizer)

        follow(cls, name, self.job.guard, after=prepared)

    def _follow(self) -> None:
        schedules, guard = sys.modules[_SCHEDULES], self.job.guard
        for name in _PIPELINES:
            follow(schedules, name, guard, before=lambda _, given: self._begin(given))
        for name in (*_PIPELINES, _WHOLE):
            follow(schedules, name, guard, before=lambda _, given: self._scale(given), after=self._unscaled)

    def _begin(self, given: dict[str, Any]) -> None:
        """A step of a pipeline begins."""
        for model in _models(given):
            stage = next((chunk for chunk in self._chunks if chunk.submod is model), None)
            if stage is None:
                stage = _Chunk(model, _group_of_pipeline(given.get("p2p_communicator")))
                self._chunks = [chunk for chunk in self._chunks if chunk.submod is not None] + [stage]
                self.job.changed()
            stage.chunks = given["num_microbatches"]
            # Stages in the middle are called without a batch.
            varies = _config(model).variable_seq_lengths
            stage.microbatch = (-1, -1) if varies else (given["micro_batch_size"], given["seq_length"])
            self.job.prepared(stage)
        self.job.begin_batch()

    def _scale(self, given: dict[str, Any]) -> None:
        """The loss of a microbatch is divided by how many these are, unless it is a sum over tokens. A scale on top of
        that is asked for once in a step, before it computes anything; one that never changes, once."""
        if not self.job.wants_gradients():
            return
        config = _config(_models(given)[0])
        divisor = 1 if getattr(config, "calculate_per_token_loss", False) else given["num_microbatches"]
        self.job.loss_scale(self._scale_by(config.grad_scale_func, divisor))

    def _scale_by(self, function: Callable[[torch.Tensor], torch.Tensor] | None, divisor: int) -> Any:
        """What a function scales losses by, if there is one, over `divisor`."""
        if function is None:
            return self.job.scale(1.0, divisor)
        optimizer = getattr(function, "__self__", None)
        constant = _has_constant_scale(optimizer)
        if constant and (known := self._constants.get(optimizer)) is not None and known[0] == divisor:
            return known[1]
        scale = self.job.scale(function(torch.ones(())), divisor)
        if constant and scale is not None:
            self._constants[optimizer] = divisor, scale
        return scale

    def _unscaled(self, *_: Any) -> None:
        self.job.unscaled()

    def stages(self) -> list[Stage]:
        return list(self._chunks)

    def see(self, module: nn.Module, model: ModelFacts) -> None:
        if _is_layer(module, "ColumnParallelLinear", "RowParallelLinear", "VocabParallelEmbedding"):
            model.order = TURNED
        if Megatron not in model.notes and _state() is not None:
            for name, parameter in stored(module).items():
                if self.job.faults.of(name, getattr, parameter, "tensor_model_parallel", False):
                    model.notes[Megatron] = True

    def conclude(self, model: ModelFacts) -> None:
        # Others mark parameters as it does, and have none of its groups.
        if Megatron in model.notes:
            for what, name, role in _GROUPS:
                group = getattr(_state(), f"get_{what}_parallel_group")()
                model.axes.append(self.job.meshes.axis_of_group(group, name, role))

    def read(self, parameter: torch.Tensor, kind: int, model: ModelFacts) -> Piece | None:
        # Its own wrapper accumulates in buffers.
        if kind == KIND_GRAD_UNCLIPPED and getattr(parameter, "main_grad", None) is not None:
            raise ElsewhereError
        return NotImplemented

    def held_as(self, parameter: torch.Tensor, model: ModelFacts) -> list[torch.Tensor] | None:
        copy = _main(parameter)
        return None if copy is None else [copy]

    def gradient_in_copy(self, parameter: torch.Tensor, model: ModelFacts) -> torch.Tensor | None:
        copy = _main(parameter)
        return None if copy is None else copy.grad

    def placement_by_module(
        self, tensor: torch.Tensor, module: nn.Module, is_input: bool
    ) -> list[AxisPlacement] | None:
        dim = _cut_dimension(tensor, module, is_input)
        group = None if dim is None else _group_of(module)
        if dim is None or group is None:
            return None
        return [self.job.meshes.axis_of_group(group, "tp", TENSOR).placed(SHARD, dim)]


class _Chunk:
    """A stage. megatron-core has no object for one."""

    def __init__(self, model: nn.Module, group: Any) -> None:
        self._model = weakref.ref(model)
        self.group = group
        self.chunks = 1
        self.microbatch = (-1, -1)

    @property
    def submod(self) -> nn.Module | None:
        return self._model()


def _main(parameter: Any) -> torch.Tensor | None:
    """What an optimizer has for a parameter of another type; None where it has that itself, or a piece of it."""
    return None if getattr(parameter, "main_param_sharded", False) else getattr(parameter, "main_param", None)


def _has_constant_scale(optimizer: Any) -> bool:
    """Whether the scale of an optimizer's losses never changes: it has a scaler that keeps it, or none."""
    if not hasattr(optimizer, "grad_scaler"):
        return False
    return optimizer.grad_scaler is None or is_instance(optimizer.grad_scaler, _SCALERS, "ConstantGradScaler")


def _models(given: dict[str, Any]) -> list[nn.Module]:
    models = given["model"]
    return models if isinstance(models, list) else [models]


def _config(model: nn.Module) -> Any:
    return sys.modules["megatron.core.utils"].get_model_config(model)  # type: ignore[attr-defined]


def _state() -> Any:
    """Where megatron-core has its process groups; None if it has none yet."""
    state = sys.modules.get(_STATE)
    return state if state is not None and state.model_parallel_is_initialized() else None


def _group_of_pipeline(communicator: Any) -> Any:
    if communicator is not None:
        return communicator.pp_group
    return sys.modules[_STATE].get_pipeline_model_parallel_group()  # type: ignore[attr-defined]


def _group_of(module: nn.Module) -> Any:
    """The process group of a module's tensor parallelism; None if it has none."""
    group = getattr(module, "tp_group", None)
    if group is not None:
        return group
    state = _state()
    return None if state is None else state.get_tensor_model_parallel_group()


def _is_layer(module: nn.Module, *names: str) -> bool:
    return any(is_instance(module, _LAYERS, name) for name in names)


def _cut_dimension(tensor: torch.Tensor, module: Any, is_input: bool) -> int | None:
    """The dimension of which a module is given, or gives, a piece."""
    if _is_layer(module, "ColumnParallelLinear"):
        if is_input:
            return 0 if module.sequence_parallel else None
        return None if module.gather_output else tensor.dim() - 1
    if _is_layer(module, "RowParallelLinear"):
        if is_input:
            return tensor.dim() - 1 if module.input_is_parallel else None
        return 0 if module.sequence_parallel and tensor.dim() > 1 else None
    if _is_layer(module, "VocabParallelEmbedding"):
        return 0 if not is_input and module.reduce_scatter_embeddings else None
    # A mark on the parameters of modules between its layers.
    marked = any(getattr(p, "sequence_parallel", False) for p in stored(module).values())
    return 0 if marked and tensor.dim() > 1 else None
