"""What modules say about the order of their dimensions: where the batch is."""

from __future__ import annotations

from torch import nn

from .naming import held_by, own

# Codes of wire::tap_abi::Order.
UNSTATED, _SEQUENCE_FIRST, _IN_SEQUENCE_FIRST, _BATCH_FIRST, _RECURRENT, _MIXED, TURNED = range(7)


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
