"""Pipelines of `torch.distributed.pipelining`: which modules are stages, and into how many microbatches a step goes."""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

from .mesh import PIPELINE, Axis, Meshes
from .naming import all_in

MODULE = "torch.distributed.pipelining.stage"


class Pipelines:
    """Every stage that this process has."""

    def __init__(self, pause: Callable[[bool], None]) -> None:
        self._stages: weakref.WeakSet[Any] = weakref.WeakSet()
        self._pause = pause

    def watch(self, on_prepared: Callable[[nn.Module], None]) -> None:
        """Follow the stages.

        Before its first step a stage runs its module on made-up input, to learn the shapes of what it gives: nothing of
        that is captured. `on_prepared` is told the module afterwards.
        """
        module = sys.modules[MODULE]
        base, pause = module._PipelineStageBase, self._pause  # type: ignore[attr-defined]
        original_init, stages = base.__init__, self._stages

        @functools.wraps(original_init)
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            original_init(self, *args, **kwargs)
            stages.add(self)

        base.__init__ = __init__
        for cls in (module._PipelineStage, module.PipelineStage):  # type: ignore[attr-defined]
            if "_prepare_forward_infra" in vars(cls):
                cls._prepare_forward_infra = _paused(cls._prepare_forward_infra, pause, on_prepared)

    def stage_of(self, model: nn.Module) -> Any:
        """The stage that runs a model, which may be wrapped; None if there is none."""
        return next((stage for stage in list(self._stages) if any(m is model for m in all_in(stage.submod))), None)

    def axes(self, stage: Any, meshes: Meshes) -> list[Axis]:
        """The axis whose members are the stages."""
        group = stage.group or sys.modules["torch.distributed"].group.WORLD  # type: ignore[attr-defined]
        return [meshes.axis_of_group(group, "pp", PIPELINE)]


def _paused(original: Any, pause: Callable[[bool], None], then: Callable[[nn.Module], None]) -> Any:
    @functools.wraps(original)
    def prepare(self: Any, *args: Any, **kwargs: Any) -> Any:
        pause(True)
        try:
            return original(self, *args, **kwargs)
        finally:
            pause(False)
            then(self.submod)

    return prepare
