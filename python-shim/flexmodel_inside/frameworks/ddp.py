"""`DistributedDataParallel`: every rank has the whole model."""

from __future__ import annotations

import sys

import torch
from torch import nn

from ..mesh import DATA
from ..naming import is_instance
from .adapter import Adapter, ModelFacts

_MODULE, _CLASS = "torch.nn.parallel.distributed", "DistributedDataParallel"


class Ddp(Adapter):
    """One axis, on which the batch is."""

    imports = (_MODULE,)
    wrappers = ((_MODULE, _CLASS),)
    subclass_prefixes = ("DDP",)

    def see(self, module: nn.Module, model: ModelFacts) -> None:
        if is_instance(module, _MODULE, _CLASS):
            model.wrapped("DDP", replicated=True)
            model.axes.append(self.job.meshes.axis_of_group(module.process_group, "dp", DATA))

    def is_reducing(self) -> bool | None:
        return getattr(sys.modules[_MODULE], _CLASS)._active_ddp_module is not None and torch.is_grad_enabled() or None
