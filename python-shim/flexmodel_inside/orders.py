"""What modules say about the order of their dimensions: where the batch is."""

from __future__ import annotations

from torch import nn

from ._bridge import ORDER_BATCH_FIRST as _BATCH_FIRST
from ._bridge import ORDER_IN_SEQUENCE_FIRST as _IN_SEQUENCE_FIRST
from ._bridge import ORDER_MIXED as _MIXED
from ._bridge import ORDER_RECURRENT as _RECURRENT
from ._bridge import ORDER_SEQUENCE_FIRST as _SEQUENCE_FIRST
from ._bridge import ORDER_TURNED as TURNED  # noqa: F401
from ._bridge import ORDER_UNSTATED as UNSTATED
from .naming import held_by, own


def orders(names: list[tuple[str, nn.Module]]) -> list[int]:
    """What each module says: `batch_first=False` is [length, batch, ...], inside of it too."""
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
            out.append(_MIXED if stating else UNSTATED)
    return out


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
