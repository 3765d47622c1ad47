"""How the job distributes a model, read off the objects it is made of.

Nothing is imported that the job has not imported.
"""

from __future__ import annotations

import itertools
import sys
from typing import Any

from torch import nn

from .naming import all_in, held_by, own


def _class(module: str, name: str) -> type | None:
    return getattr(sys.modules.get(module), name, None)


def _is(value: object, module: str, name: str) -> bool:
    cls = _class(module, name)
    return isinstance(cls, type) and isinstance(value, cls)


def wrapper_name(top: nn.Module) -> str:
    """`FSDP1`, `FSDP2`, `DDP`, `DeepSpeed ZeRO-3`, ...; '' for none."""
    for module in all_in(top):
        if _is(module, "deepspeed.runtime.engine", "DeepSpeedEngine"):
            stage = getattr(module, "zero_optimization_stage", lambda: 0)()
            return f"DeepSpeed ZeRO-{stage}"
        if _is(module, "torch.distributed.fsdp", "FullyShardedDataParallel"):
            return "FSDP1"
        if _is(module, "torch.distributed.fsdp", "FSDPModule"):
            return "FSDP2"
        if _is(module, "torch.nn.parallel", "DistributedDataParallel"):
            return "DDP"
    return ""


def _tensor_parallel(parameter: Any, fsdp2: bool) -> bool:
    if getattr(parameter, "tensor_model_parallel", False):  # megatron's mark
        return True
    return not fsdp2 and _is(parameter, "torch.distributed.tensor", "DTensor")


def _fsdp2_over_tensor_parallel(module: nn.Module) -> bool:
    state = getattr(module, "_get_fsdp_state", lambda: None)()
    groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
    return any(getattr(p, "is_dtensor", False) for g in groups if g is not None for p in getattr(g, "fsdp_params", ()))


def is_data_parallel(top: nn.Module) -> bool:
    """Whether every rank runs the whole model on its own part of the batch."""
    modules = all_in(top)
    fsdp2 = [m for m in modules if _is(m, "torch.distributed.fsdp", "FSDPModule")]
    if any(map(_fsdp2_over_tensor_parallel, fsdp2)):
        return False
    parameters = itertools.chain.from_iterable(own(m, "_parameters", {}).values() for m in modules)
    return not any(_tensor_parallel(p, bool(fsdp2)) for p in parameters)


# Codes of wire::tap_abi::Order.
_UNSTATED, _SEQUENCE_FIRST, _IN_SEQUENCE_FIRST, _BATCH_FIRST, _RECURRENT, _MIXED = range(6)


def _batch_first(module: nn.Module) -> bool | None:
    """What the module itself says; torch's transformer layers say it by their attention."""
    children = dict(held_by(module))
    if isinstance(module, (nn.TransformerEncoder, nn.TransformerDecoder)) and "layers" in children:
        layers = held_by(children["layers"])
        return _batch_first(layers[0][1]) if layers else None
    if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
        module = children.get("self_attn", module)
    stated = own(module, "batch_first", None)
    return stated if isinstance(stated, bool) else None


def orders(names: list[tuple[str, nn.Module]]) -> list[int]:
    """What each module says about where the batch is: `batch_first=False` is [length, batch, ...], inside of it too."""
    stating = {name for name, module in names if _batch_first(module) is False}
    out = []
    for name, module in names:
        parts = name.split(".") if name else []
        if name in stating:
            out.append(_SEQUENCE_FIRST)
        elif _batch_first(module):
            out.append(_RECURRENT if isinstance(module, nn.RNNBase) else _BATCH_FIRST)
        elif any(".".join(parts[:i]) in stating for i in range(len(parts))):
            out.append(_IN_SEQUENCE_FIRST)
        else:
            out.append(_MIXED if stating else _UNSTATED)
    return out
