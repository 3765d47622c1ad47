"""How the job distributes a model, read off the objects it is made of.

Nothing is imported that the job has not imported.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from ._bridge import ORDER_BATCH_FIRST as _BATCH_FIRST
from ._bridge import ORDER_IN_SEQUENCE_FIRST as _IN_SEQUENCE_FIRST
from ._bridge import ORDER_MIXED as _MIXED
from ._bridge import ORDER_RECURRENT as _RECURRENT
from ._bridge import ORDER_SEQUENCE_FIRST as _SEQUENCE_FIRST
from ._bridge import ORDER_TURNED as _TURNED
from ._bridge import ORDER_UNSTATED as UNSTATED
from .naming import all_in, held_by, own


def is_instance(value: object, module: str, name: str) -> bool:
    """Whether `value` is of a class that may not be imported."""
    cls = getattr(sys.modules.get(module), name, None)
    return isinstance(cls, type) and issubclass(type(value), cls)


def wrapper_name(top: nn.Module) -> str:
    """`FSDP1`, `FSDP2`, `DDP`, `DeepSpeed ZeRO-3`, ...; '' for none."""
    for module in all_in(top):
        if is_instance(module, "deepspeed.runtime.engine", "DeepSpeedEngine"):
            stage = getattr(module, "zero_optimization_stage", lambda: 0)()
            return f"DeepSpeed ZeRO-{stage}"
        if is_instance(module, "torch.distributed.fsdp", "FullyShardedDataParallel"):
            return "FSDP1"
        if is_instance(module, "torch.distributed.fsdp", "FSDPModule"):
            return "FSDP2"
        if is_instance(module, "torch.nn.parallel", "DistributedDataParallel"):
            return "DDP"
    return ""


def is_megatron(module: nn.Module, *names: str) -> bool:
    """Whether it is one of megatron-core's parallel layers, or of those with these names."""
    names = names or ("ColumnParallelLinear", "RowParallelLinear", "VocabParallelEmbedding")
    return any(is_instance(module, "megatron.core.tensor_parallel.layers", name) for name in names)


def fsdp2_groups(module: nn.Module) -> list[Any]:
    """What `fully_shard` shards together of a module: an `FSDPParamGroup` or, from torch 2.12 on, several."""
    if not is_instance(module, "torch.distributed.fsdp", "FSDPModule"):
        return []
    state = module._get_fsdp_state()  # type: ignore[operator]
    groups = getattr(state, "_fsdp_param_groups", None)
    return list(groups) if groups is not None else [g for g in [state._fsdp_param_group] if g is not None]


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
    if any(is_megatron(module) for _, module in names):
        return [_TURNED] * len(names)
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
            out.append(_MIXED if stating else UNSTATED)
    return out
