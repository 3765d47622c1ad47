"""Pipelines of `torch.distributed.pipelining` and megatron-core: which modules are stages, and into how many
microbatches a step goes."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

from .mesh import PIPELINE, Axis, Meshes
from .naming import all_in
from .patches import follow, given, wrap

TORCH = "torch.distributed.pipelining.stage"
MEGATRON = "megatron.core.pipeline_parallel.schedules"
# What megatron-core runs the steps of a pipeline with, and those of a model in one piece.
MEGATRON_PIPELINES = (
    "forward_backward_pipelining_without_interleaving",
    "forward_backward_pipelining_with_interleaving",
)
MEGATRON_WHOLE = "forward_backward_no_pipelining"


class _Chunk:
    """A stage of megatron-core's, which has no object for one, with the names that torch's have."""

    def __init__(self, model: nn.Module, group: Any) -> None:
        self._model = weakref.ref(model)
        self.group = group
        self.chunks = 1
        self.microbatch = (-1, -1)

    @property
    def submod(self) -> nn.Module | None:
        return self._model()


class Pipelines:
    """Every stage that this process has."""

    def __init__(
        self, guard: Callable[..., Any], pause: Callable[[bool], None], on_made: Callable[[], None]
    ) -> None:
        # Makes of a function one that raises nothing.
        self._guard = guard
        self._stages: weakref.WeakSet[Any] = weakref.WeakSet()
        self._chunks: list[_Chunk] = []
        self._pause = pause
        # There is one stage more.
        self._on_made = on_made

    def watch_torch(self, on_prepared: Callable[[Any], None]) -> None:
        """Follow torch's stages.

        Before its first step a stage runs its module on made-up input, to learn the shapes of what it gives: nothing of
        that is captured. `on_prepared` is told the stage afterwards.
        """
        module = sys.modules[TORCH]

        def made(_: Any, *call: Any) -> None:
            self._stages.add(given(*call, 0, "self"))
            self._on_made()

        follow(module._PipelineStageBase, "__init__", self._guard, after=made)  # type: ignore[attr-defined]
        for cls in (module._PipelineStage, module.PipelineStage):  # type: ignore[attr-defined]
            if "_prepare_forward_infra" in vars(cls):
                self._pause_during(cls, "_prepare_forward_infra", on_prepared)

    def _pause_during(self, cls: Any, name: str, then: Callable[[Any], None]) -> None:
        pause, then = self._guard(self._pause), self._guard(then)

        def pausing(original: Any) -> Any:
            def prepare(*args: Any, **kwargs: Any) -> Any:
                pause(True)
                try:
                    return original(*args, **kwargs)
                finally:
                    pause(False)
                    then(given(args, kwargs, 0, "self"))

            return prepare

        wrap(cls, name, pausing)

    def watch_megatron(self, on_begun: Callable[[Any], None]) -> None:
        """Follow the pipelines of megatron-core. `on_begun` is told a stage before each of its steps."""

        def begin(_: tuple, given: dict[str, Any]) -> None:
            models = given["model"]
            for model in models if isinstance(models, list) else [models]:
                stage = next((chunk for chunk in self._chunks if chunk.submod is model), None)
                if stage is None:
                    stage = _Chunk(model, _group_of_pipeline(given.get("p2p_communicator")))
                    self._chunks = [chunk for chunk in self._chunks if chunk.submod is not None] + [stage]
                    self._on_made()
                stage.chunks = given["num_microbatches"]
                stage.microbatch = _microbatch_of(model, given)
                on_begun(stage)

        for name in MEGATRON_PIPELINES:
            follow(sys.modules[MEGATRON], name, self._guard, before=begin)

    def modules(self) -> list[nn.Module]:
        """What the stages run, which may be wrapped."""
        return [stage.submod for stage in [*self._stages, *self._chunks] if stage.submod is not None]

    def stage_of(self, model: nn.Module) -> Any:
        """The stage that runs a model; None if there is none."""
        stages = [stage for stage in [*self._stages, *self._chunks] if stage.submod is not None]
        return next((stage for stage in stages if any(module is model for module in all_in(stage.submod))), None)

    def axes(self, stage: Any, meshes: Meshes) -> list[Axis]:
        """The axis whose members are the stages."""
        group = stage.group or sys.modules["torch.distributed"].group.WORLD  # type: ignore[attr-defined]
        return [meshes.axis_of_group(group, "pp", PIPELINE)]


def _microbatch_of(model: nn.Module, given: dict[str, Any]) -> tuple[int, int]:
    """Batch and length of a microbatch, which stages in the middle are called without; negative if they vary."""
    if sys.modules["megatron.core.utils"].get_model_config(model).variable_seq_lengths:  # type: ignore[attr-defined]
        return -1, -1
    return given["micro_batch_size"], given["seq_length"]


def _group_of_pipeline(communicator: Any) -> Any:
    if communicator is not None:
        return communicator.pp_group
    return sys.modules["megatron.core.parallel_state"].get_pipeline_model_parallel_group()  # type: ignore[attr-defined]
