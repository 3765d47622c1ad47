"""Wrappers of torch's that distribute nothing: what they wrap keeps its names."""

from __future__ import annotations

from .adapter import Adapter


class TorchWrappers(Adapter):
    """torch.compile's, those of activation checkpointing, DataParallel, averaged models and parametrizations."""

    wrappers = (("torch.nn.parallel.data_parallel", "DataParallel"), ("torch.optim.swa_utils", "AveragedModel"))
    private_children = ("_orig_mod", "_checkpoint_wrapped_module")
    subclass_prefixes = ("Parametrized",)
