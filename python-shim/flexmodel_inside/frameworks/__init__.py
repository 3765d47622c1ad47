"""The frameworks that FlexModel knows: one file each, with its adapter. To add one, write it and put it on the list.

`adapter.py` says what an adapter may answer.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from torch import nn

from .. import naming
from .adapter import Adapter, Job, ModelFacts, Stage

# In the order in which they are asked. Who says the outer axes comes first.
_FILES = (
    "torch_wrappers",  # torch's wrappers that distribute nothing
    "deepspeed",  # DeepSpeed's engine and ZeRO
    "fsdp1",  # FullyShardedDataParallel
    "fsdp2",  # fully_shard
    "ddp",  # DistributedDataParallel
    "dtensor",  # DTensors, and local tensors made from them
    "device_mesh",  # the meshes that the job makes
    "megatron",  # megatron-core's parallel layers, process groups and schedules
    "marks",  # the marks of megatron's on parameters, which others make too
    "context_parallel",  # how torch cuts sequences
    "pipelining",  # torch's stages of pipelines
    "amp",  # torch's loss scaling, and the steps that it skips
    "checkpoint",  # steps that torch's checkpoints make
    "optimizers",  # the clock: what ends a step
    "distributed",  # when this process becomes a rank
    "cuda_graphs",  # CUDA graphs that are made of modules
    "compiler",  # when torch.compile comes into use
    "vllm",  # the keys of vLLM's compiled graphs
)


def _adapter_in(file: ModuleType) -> type[Adapter]:
    """The adapter that a file defines."""
    (found,) = (
        each
        for each in vars(file).values()
        if isinstance(each, type) and issubclass(each, Adapter) and each.__module__ == file.__name__
    )
    return found


ADAPTERS = [_adapter_in(importlib.import_module(f"{__name__}.{name}")) for name in _FILES]

# What stands for the answer of one that raised.
_RAISED = object()

for _adapter in ADAPTERS:
    naming.know(_adapter)


class Frameworks:
    """The adapters of this process, of which those are asked that are present."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._adapters = [adapter(job) for adapter in ADAPTERS]
        self._present: list[Adapter] = []
        # Those that are present and have an answer to a question, by the name of its method.
        self._answering: dict[str, list[Any]] = {}
        job.layouts.frameworks = self
        job.parameter_taps.frameworks = self

    def watch(
        self,
        when_imported: Callable[[Sequence[str], Callable[[], object]], None],
        guarded: Callable[[Callable[[], object]], Callable[[], object]],
    ) -> None:
        """Have each adapter present, and following what it follows, once its modules are imported. `guarded` makes of
        a function one that turns taps off where it raises."""
        for adapter in self._adapters:
            when_imported(adapter.imports, guarded(lambda adapter=adapter: self._arrive(adapter)))
            for names, function in adapter.watches():
                when_imported(names, guarded(function))

    def _arrive(self, adapter: Adapter) -> None:
        arrived = {*self._present, adapter}
        self._present = [each for each in self._adapters if each in arrived]
        self._answering.clear()

    def _who(self, question: str) -> list[Any]:
        """The methods of those that answer it, in order."""
        methods = self._answering.get(question)
        if methods is None:
            base = getattr(Adapter, question)
            methods = [getattr(each, question) for each in self._present if getattr(type(each), question) is not base]
            self._answering[question] = methods
        return methods

    def look_at(self, modules: list[nn.Module], with_parameters: bool) -> ModelFacts:
        """What adapters say of a model, each of whose modules is shown to them once."""
        model, of = ModelFacts(with_parameters), self._job.faults.of

        def ask(method: Any, what: str, *about: Any) -> None:
            raised = of(_about(method, what), method, *about, otherwise=_RAISED) is _RAISED
            model.is_known = model.is_known and not raised

        for begin in self._who("begin"):
            ask(begin, "models", model)
        for module in modules:
            for see in self._who("see"):
                ask(see, f"a {type(module).__name__}", module, model)
        for conclude in self._who("conclude"):
            ask(conclude, "a model", model)
        return model

    def first(self, question: str, *about: Any) -> Any:
        """The first answer to a question that may have one; None if there is none. What raises costs the value that
        was asked about: it may be a part of something, and nobody knows of what."""
        for ask in self._who(question):
            answer = ask(*about)
            if answer is not None:
                return answer
        return None

    def decided(self, question: str, *about: Any) -> Any:
        """The answer to a question that is one adapter's to decide; `NotImplemented` if it is nobody's."""
        for ask in self._who(question):
            answer = ask(*about)
            if answer is not NotImplemented:
                return answer
        return NotImplemented

    def tell(self, event: str, *about: Any) -> None:
        """Something happened, for whoever follows it."""
        for hear in self._who(event):
            self._job.faults.of(_about(hear, "backward passes"), hear, *about)

    def stages(self) -> list[Stage]:
        """All stages whose modules live."""
        of = self._job.faults.of
        return [stage for ask in self._who("stages") for stage in of(_about(ask, "stages"), _living, ask) or []]


def _living(stages: Callable[[], Sequence[Stage]]) -> list[Stage]:
    return [stage for stage in stages() if stage.submod is not None]


def _about(method: Any, what: str) -> str:
    """A name for what is lost where it raises."""
    return f"what {type(method.__self__).__name__} knows of {what}"
