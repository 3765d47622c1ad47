"""`DistributedDataParallel`: every rank has the whole model."""

from __future__ import annotations

import sys
import weakref
from typing import Any

import torch
from torch import nn

from .._bridge import KIND_GRAD_UNCLIPPED, KIND_PARAM
from .._bridge import PLACEMENT_PARTIAL as PARTIAL
from .._bridge import PLACEMENT_REPLICATE as REPLICATE
from .._bridge import PLACEMENT_UNKNOWN as UNKNOWN
from ..mesh import DATA
from ..naming import is_instance
from .adapter import Adapter, Job, ModelFacts

_MODULE, _CLASS = "torch.nn.parallel.distributed", "DistributedDataParallel"


class Ddp(Adapter):
    """One axis, on which the batch is."""

    imports = (_MODULE,)
    wrappers = ((_MODULE, _CLASS),)
    subclass_prefixes = ("DDP",)

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        # Wrappers, with the number of steps that had ended when a backward pass last reduced their gradients.
        self._reduced: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._ended = 0

    def see(self, module: nn.Module, model: ModelFacts) -> None:
        if is_instance(module, _MODULE, _CLASS):
            model.wrapped("DDP", replicated=True)
            model.notes.setdefault(Ddp, weakref.ref(module))
            self._reduced.setdefault(module, -1)
            model.axes.append(self.job.meshes.axis_of_group(module.process_group, "dp", DATA))

    def is_reducing(self) -> bool | None:
        under_way = getattr(sys.modules[_MODULE], _CLASS)._active_ddp_module
        return True if under_way is not None and torch.is_grad_enabled() else None

    def went_backward(self, ended: int) -> None:
        self._ended = ended
        for module in self._reduced:
            if module.require_forward_param_sync:
                self._reduced[module] = ended

    def along_batch(self, model: ModelFacts, kind: int) -> int | None:
        where = model.notes.get(Ddp)
        module = None if where is None else where()
        if module is None:
            return None
        # Ranks that still have batches step without the others.
        if getattr(getattr(module, "_join_config", None), "enable", False):
            return UNKNOWN
        if kind == KIND_PARAM:
            return REPLICATE if self.is_reducing() else UNKNOWN
        # Whether gradients are reduced since its last forward pass with gradients.
        if kind != KIND_GRAD_UNCLIPPED or module.require_forward_param_sync:
            return REPLICATE
        # Beside what was reduced before, it is no addend of the whole.
        return UNKNOWN if self._reduced.get(module) == self._ended else PARTIAL
