"""Element types: torch's names, their sizes, and raw bytes as torch tensors or numpy arrays of them."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _native

Bytes = NDArray[np.uint8]

SIZES = dict(_native.dtypes())
"""Bytes per element of every dtype."""

_ML_DTYPES = frozenset(n for n in SIZES if n == "bfloat16" or n.startswith("float8"))


@functools.cache
def torch_or_none() -> Any:
    """The torch module, imported now if it was not; None where it is not installed."""
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        return None
    return torch if hasattr(torch, "frombuffer") else None  # a directory named torch is not torch


def numpy_dtype(name: str) -> np.dtype[Any]:
    """numpy's dtype of this name; TypeError where numpy has none, with what to install."""
    if name in _ML_DTYPES:
        try:
            found: np.dtype[Any] = np.dtype(getattr(importlib.import_module("ml_dtypes"), name))
            return found
        except (ImportError, AttributeError):
            raise TypeError(f"numpy alone has no {name}: install ml_dtypes (0.5 or newer) or torch") from None
    if name == "complex32":
        raise TypeError("numpy has no complex32: install torch and use tensor()")
    return np.dtype(name).newbyteorder("<")


def as_numpy(raw: Bytes, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """`raw` as an array of `dtype` and `shape`, without a copy."""
    return raw.view(numpy_dtype(dtype)).reshape(shape)


def as_torch(torch: Any, raw: Bytes, dtype: str, shape: tuple[int, ...]) -> Any:
    """`raw` as a torch.Tensor of `dtype` and `shape`, without a copy where it is aligned."""
    kind = getattr(torch, dtype, None)
    if kind is None:
        raise TypeError(f"torch {torch.__version__} has no {dtype}: use a newer torch, or numpy() of the record")
    if not raw.size:
        return torch.empty(shape, dtype=kind)
    if raw.ctypes.data % SIZES[dtype]:
        raw = raw.copy()
    return torch.frombuffer(raw, dtype=kind).reshape(shape)
