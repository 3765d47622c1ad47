"""Finding the one record that a call means, or saying in one line what there is instead."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

from ._errors import NotCapturedError
from ._text import clip
from ._types import KINDS, Identity, ModelInfo, Refusal

_SPELLED = 6  # values that are listed one by one
_PIECES = 64  # numbers in a name that count as such when names are ordered
_COMPARED = 2000  # names that one is compared with to find the nearest
_LETTERS = 100  # of each of them


def one(module: str, candidates: Sequence[Identity], refused: Sequence[Refusal], wanted: dict[str, Any]) -> Identity:
    """The one of `candidates` (all of `module`, at least one) that has the `wanted` fields; None there means any."""
    left = list(candidates)
    for field, value in wanted.items():
        if value is None:
            continue
        kept = [c for c in left if getattr(c, field) == value]
        if not kept:
            raise NotCapturedError(_none(module, field, value, left, refused, wanted))
        left = kept
    if len(left) == 1:
        return left[0]
    varying = [f for f in wanted if len({getattr(c, f) for c in left}) > 1]
    choices = ", ".join(f"{f}= ({_spell(getattr(c, f) for c in left)})" for f in varying)
    kind = left[0].kind if "kind" not in varying else "of several kinds"
    raise NotCapturedError(f"{shown(module)} has {len(left)} records {kind}; say which: {choices}")


def _none(
    module: str, field: str, value: Any, left: Sequence[Identity], refused: Sequence[Refusal], wanted: dict[str, Any]
) -> str:
    there = _spell(getattr(c, field) for c in left)
    name = shown(module)
    reasons = [
        r.reason for r in refused
        if r.what.module == module and all(v is None or getattr(r.what, f) == v for f, v in wanted.items())
    ]  # fmt: skip
    if reasons:
        return f"{name} was refused there {len(reasons)} times: {reasons[0]}"
    if field == "kind":
        if value not in KINDS:
            return f"there is no kind {value!r}; kinds are {', '.join(KINDS)}; {name} has {there}"
        return f"{name} has nothing of kind {value}; it has {there}"
    hint = ""
    if field == "path" and str(value).split("[")[0].split(".")[0] == "out" and wanted["kind"] == "backward":
        hint = "; kind 'backward' is the gradient of the inputs, that of the outputs is kind 'backward_pre'"
    if field == "path" and str(value).split("[")[0].split(".")[0] == "in" and wanted["kind"] == "backward_pre":
        hint = "; kind 'backward_pre' is the gradient of the outputs, that of the inputs is kind 'backward'"
    return f"{name} has no {left[0].kind} with {field}={value!r}; {field} is {there}{hint}"


def unknown_module(
    module: str, names: Sequence[str], models: Iterable[ModelInfo], refused: Sequence[Refusal]
) -> NotCapturedError:
    """The error for a module that has no record; `names` are those that have."""
    reasons = [r.reason for r in refused if r.what.module == module]
    if reasons:
        return NotCapturedError(f"{shown(module)} was refused {len(reasons)} times: {reasons[0]}")
    if not names:
        return NotCapturedError(f"{shown(module)} is not captured: the run holds no records")
    known = any(m.name == module for model in models for m in model.modules)
    why = "is in the model, but nothing of it is captured" if known else "is not captured"
    near = _nearest(module, names)
    there = f"the nearest are {', '.join(map(shown, near))}" if near else f"captured are {_spell(map(shown, names))}"
    return NotCapturedError(f"{shown(module)} {why}; {there}")


def _nearest(module: str, names: Sequence[str]) -> list[str]:
    """Up to three of `names` that are like `module`, by the start of each."""
    starts = {name[:_LETTERS]: name for name in reversed(names[:_COMPARED])}
    return [starts[near] for near in difflib.get_close_matches(module[:_LETTERS], starts, n=3, cutoff=0.5)]


def shown(module: str) -> str:
    """A module's name for people."""
    return clip(module) or "(root)"


@functools.lru_cache(1 << 16)
def natural(name: str) -> list[Any]:
    """Sort key under which layers.10 comes after layers.2."""
    pieces = re.split(r"(\d+)", name, maxsplit=_PIECES)
    return [(len(s.lstrip("0")), s.lstrip("0")) if at % 2 else s for at, s in enumerate(pieces)]


def _spell(values: Iterable[Hashable]) -> str:
    """Distinct values for a message: all of a few, and the ends of many."""
    distinct = list(dict.fromkeys(values))
    if all(isinstance(v, int) for v in distinct):
        distinct.sort(key=lambda v: v)  # type: ignore[arg-type,return-value]
        first, last = distinct[0], distinct[-1]
        if len(distinct) > 2 and not isinstance(first, bool) and last - first == len(distinct) - 1:  # type: ignore[operator]
            return f"{first} to {last}"
        if len(distinct) > _SPELLED:
            return f"{len(distinct)} values from {first} to {last}: {', '.join(map(str, distinct[:3]))}, ..."
    more = f" and {len(distinct) - _SPELLED} more" if len(distinct) > _SPELLED else ""
    return ", ".join(clip(str(value)) for value in distinct[:_SPELLED]) + more
