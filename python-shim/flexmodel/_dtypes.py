"""Element types: torch's names, their sizes, and raw bytes as torch tensors or numpy arrays of them."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

SIZES = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2,
    "float8_e4m3fn": 1, "float8_e5m2": 1, "float8_e4m3fnuz": 1, "float8_e5m2fnuz": 1, "float8_e8m0fnu": 1,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint64": 8, "uint32": 4, "uint16": 2, "uint8": 1,
    "bool": 1, "complex64": 8, "complex128": 16, "complex32": 4,
}  # fmt: skip
"""Bytes per element of every dtype in `wire/src/dtype.rs`."""

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


def add(dtype: str, addends: Iterator[Bytes]) -> Bytes:
    """The elementwise sum: floats and complex in float64 and rounded once, integers wrapping."""
    if dtype in ("bool", "float8_e8m0fnu"):
        raise TypeError(f"{dtype} addends have no sum; each rank's part is kept: ask for it with rank=")
    if dtype == "bfloat16":
        return _narrow(_total(map(_widen, addends))).view(np.uint8)
    component = {"complex128": "float64", "complex64": "float32", "complex32": "float16"}.get(dtype, dtype)
    try:
        exact = numpy_dtype(component)
    except TypeError:
        raise TypeError(f"adding {dtype} parts needs ml_dtypes: install it, or ask for one part with rank=") from None
    wide = np.dtype(np.float64) if component.startswith("float") else exact
    return _total(addend.view(exact).astype(wide) for addend in addends).astype(exact).view(np.uint8)


def _total(addends: Iterator[NDArray[Any]]) -> NDArray[Any]:
    """One addend after the other: no more than two are held."""
    total = next(addends)
    for addend in addends:
        total += addend
    return total


def _widen(raw: Bytes) -> NDArray[np.float64]:
    return (raw.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)


def _narrow(values: NDArray[np.float64]) -> NDArray[np.uint16]:
    """float64 to bfloat16 bits: nearest, ties to even; not-a-number stays so."""
    with np.errstate(over="ignore", invalid="ignore"):
        single = values.astype(np.float32)
        # Rounded to odd on the way through float32, so that the second rounding sees what the first one lost.
        beyond, inexact = np.abs(single) > np.abs(values), single != values
    bits = (single.view(np.uint32) - beyond.astype(np.uint32)) | inexact.astype(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype("<u2")
