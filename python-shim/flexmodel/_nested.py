"""Rows of several sizes as one nested tensor of torch's."""

from __future__ import annotations

from typing import Any


def nested_rows(torch: Any, pieces: list[Any]) -> Any:
    """The rows of tensors `[rows, ...]` of one dtype, in order: a nested tensor of layout torch.jagged, or strided
    where they differ in several dimensions, which torch.jagged has not.

    ValueError if the rows are numbers.
    """
    first = pieces[0]
    if first.dim() < 2:
        raise ValueError(f"nested=True is for rows of tensors: this is a tensor of shape {list(first.shape)}")
    uneven = [dim for dim in range(1, first.dim()) if len({piece.shape[dim] for piece in pieces}) > 1]
    if len(uneven) > 1:
        return torch.nested.nested_tensor([row for piece in pieces for row in piece])
    # Whatever the step, a module has nested tensors of one layout: that of a batch with sequences.
    (dim,) = uneven or [1]
    # Rows beside each other along that dimension. Not every operation knows every type of one byte.
    dtype, narrow = first.dtype, first.element_size() == 1
    flat = [piece.movedim(0, dim - 1).flatten(dim - 1, dim) for piece in pieces]
    values = torch.cat([piece.view(torch.uint8) for piece in flat] if narrow else flat, dim=dim - 1)
    lengths = torch.tensor([0, *(piece.shape[dim] for piece in pieces for _ in range(len(piece)))])
    values = values.view(dtype) if narrow else values
    return torch.nested.nested_tensor_from_jagged(values, lengths.cumsum(0), jagged_dim=dim)
