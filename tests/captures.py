"""Reads a run with the Python package and holds it against a reference, byte by byte."""

import math
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flexmodel
import torch

from harness import FLEXMODEL, run
from reference import Key


def read(path: pathlib.Path, model: int | None = None, job: int | None = None) -> dict[Key, torch.Tensor]:
    """Every whole tensor of a run, of one model and one job where it has several."""
    found: dict[Key, torch.Tensor] = {}
    for record in flexmodel.open(path).records:
        if model not in (None, record.model) or job not in (None, record.job):
            continue
        key = Key(record.module, record.kind, record.path, record.step, record.micro, record.call, record.train)
        assert key not in found, f"two records of {key}"
        assert record.repeat == 0, record
        found[key] = record.tensor()
    return found


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal shape, type and bytes; unlike torch.equal for every element type, and with NaNs."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    a, b = (t.detach().resolve_conj().resolve_neg().contiguous().flatten() for t in (a, b))
    return a.numel() == 0 or torch.equal(a.view(torch.uint8), b.view(torch.uint8))


# A tensor of float32 with nothing above this is a sum that is zero, as the gradient of the bias of keys is.
_NOTHING = 1e-9
# Relative and absolute tolerances by type. What is not listed is equal or different.
_TOLERANCES = {
    torch.float16: (1e-3, 1e-5),
    torch.bfloat16: (1.6e-2, 1e-5),
    torch.float32: (1e-4, 1e-5),
    torch.complex64: (1e-4, 1e-5),
    torch.float64: (1e-7, 1e-7),
    torch.complex128: (1e-7, 1e-7),
}


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal shape and type, and values that differ from those of `b` by no more than a few sums in another order do.

    Which order that is depends on the processor, and an element near zero may be the sum of large addends. So the
    absolute tolerance is for the whole tensor, in proportion to its largest magnitude as in `flexmodel certify`:
    gradients are smaller than any fixed one.
    """
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    rtol, atol = _TOLERANCES.get(b.dtype, (0.0, 0.0))
    if rtol == 0.0:
        return same_bytes(a, b)
    if b.dtype == torch.float32 and max(x.abs().max().item() if x.numel() else 0.0 for x in (a, b)) < _NOTHING:
        return True
    sizes = b.detach().abs().double()
    largest = sizes[sizes.isfinite()].max().item() if sizes.isfinite().any() else 0.0
    wide = torch.complex128 if b.is_complex() else torch.float64
    return torch.allclose(a.to(wide), b.to(wide), rtol=rtol, atol=atol * min(largest, 1.0), equal_nan=True)


def expect_close(found: Mapping[Any, torch.Tensor], expected: Mapping[Any, torch.Tensor]) -> None:
    """`expect_equal` for jobs that sum in another order than their reference."""
    expect_equal(found, expected, close)


def close_losses(found: list[str], expected: list[str]) -> bool:
    """As many losses, equal but for rounding."""
    pairs = zip(map(float.fromhex, found), map(float.fromhex, expected), strict=True)
    return all(math.isclose(a, b, rel_tol=1e-5) for a, b in pairs)


def expect_equal(
    found: Mapping[Any, torch.Tensor], expected: Mapping[Any, torch.Tensor], same: Callable = same_bytes
) -> None:
    """Fails unless both hold the same tensors, bit by bit, and says which do not."""
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    wrong = [
        f"{key}: {_describe(found[key])}, expected {_describe(value)}"
        for key, value in expected.items()
        if key in found and not same(found[key], value)
    ]
    problems = [_listed("missing", missing), _listed("unexpected", extra), _listed("different", wrong)]
    assert not any(problems), "\n".join(filter(None, problems))


def expect_sound(path: pathlib.Path) -> flexmodel.Run:
    """The run, once `flexmodel verify` passes it and nothing was dropped."""
    run([FLEXMODEL, "verify", str(path)]).expect(0)
    opened = flexmodel.open(path)
    assert opened.info.totals.dropped == 0, opened.info.totals
    assert opened.divergences == []
    assert not opened.problems
    return opened


def _listed(what: str, items: Iterable) -> str:
    items = list(items)
    return "\n  ".join([f"{len(items)} {what}:", *map(str, items[:12])]) if items else ""


def _describe(t: torch.Tensor) -> str:
    head = t.detach().flatten()[:4].tolist() if t.numel() and t.layout == torch.strided else ""
    return f"{t.dtype}{list(t.shape)} {head}"
