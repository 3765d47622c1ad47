"""Pipelines of `torch.distributed.pipelining`: which modules are stages, and into how many microbatches a step goes."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from ..patches import follow, given, wrap
from .adapter import Adapter, Job, Stage

_MODULE = "torch.distributed.pipelining.stage"
_SCHEDULES = "torch.distributed.pipelining.schedules"
_TRACING = "torch.distributed.pipelining._IR"


class _Stage:
    """One of torch's."""

    def __init__(self, stage: Any) -> None:
        self._stage = weakref.ref(stage)
        # Torch's own says it only where it has backward passes.
        self.chunks: int | None = None

    @property
    def submod(self) -> Any:
        return getattr(self._stage(), "submod", None)

    @property
    def group(self) -> Any:
        return getattr(self._stage(), "group", None)


class Pipelining(Adapter):
    """Follows torch's own stages."""

    imports = (_MODULE,)

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self._stages: weakref.WeakKeyDictionary[Any, _Stage] = weakref.WeakKeyDictionary()

    def watches(self) -> list[tuple[Sequence[str], Callable[[], object]]]:
        return [
            ((_MODULE,), self._follow),
            ((_SCHEDULES,), self._follow_schedules),
            ((_TRACING,), self._follow_tracing),
        ]

    def stages(self) -> list[Stage]:
        return list(self._stages.values())

    def _follow(self) -> None:
        module: Any = sys.modules[_MODULE]

        def made(_: Any, *call: Any) -> None:
            stage = given(*call, 0, "self")
            self._stages[stage] = _Stage(stage)
            self.job.changed()

        follow(module._PipelineStageBase, "__init__", self.job.guard, after=made)
        for cls in (module._PipelineStage, module.PipelineStage):
            if "_prepare_forward_infra" in vars(cls):
                self._pause_during(cls, "_prepare_forward_infra")

    def _follow_schedules(self) -> None:
        module: Any = sys.modules[_SCHEDULES]
        for cls in (module.PipelineScheduleSingle, module.PipelineScheduleMulti):
            follow(cls, "step", self.job.guard, before=lambda *_: self.job.begin_batch())

    def _follow_tracing(self) -> None:
        """`pipeline()` traces and cuts a model, and leaves dozens of modules for the garbage collector. Nobody calls
        these, and how many are still there would differ between ranks. What it cut becomes known as a stage."""
        pipe: Any = sys.modules[_TRACING].Pipe  # type: ignore[attr-defined]

        def ignoring(original: Any) -> Any:
            def from_tracing(*args: Any, **kwargs: Any) -> Any:
                with self.job.ignoring():
                    return original(*args, **kwargs)

            return from_tracing

        if hasattr(pipe, "from_tracing"):
            wrap(pipe, "from_tracing", ignoring)

    def _pause_during(self, cls: Any, name: str) -> None:
        """Before its first step a stage runs its module on made-up input, to learn the shapes of what it gives: nothing
        of that is captured."""
        pause, prepared = self.job.guard(self.job.pause), self.job.guard(self._prepared)

        def pausing(original: Any) -> Any:
            def prepare(*args: Any, **kwargs: Any) -> Any:
                pause(True)
                try:
                    return original(*args, **kwargs)
                finally:
                    pause(False)
                    prepared(given(args, kwargs, 0, "self"), given(args, kwargs, 1, "num_microbatches"))

            return prepare

        wrap(cls, name, pausing)

    def _prepared(self, stage: Any, chunks: int) -> None:
        self._stages[stage].chunks = chunks
        self.job.prepared(self._stages[stage])
