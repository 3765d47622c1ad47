"""What a line of the manifest says, as `agent/run/src/format.rs` defines it, or why it says nothing.

A line is taken if every field that is known has its type and lies within its bounds (`_limits.py`), and is refused
otherwise, so that nothing behind this module meets a value that cannot be. `agent/run/src/manifest.rs` takes and
refuses the same lines.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import operator
from typing import Any

from . import _limits
from ._dtypes import SIZES
from ._types import KINDS, Axis, Identity, Location, Part, Stats

_NOT_FINITE = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan, None: math.nan}
_WHAT = (
    "module", "kind", "path", "model", "step", "micro", "call", "repeat", "train",
    "class", "group", "dtype", "rank", "dp_size", "time_ns", "shape", "axes",
)  # fmt: skip
_what = operator.itemgetter(*_WHAT)
_WHAT_TYPES = [str, str, str, int, int, int, int, int, bool, str, str, str, int, int, int, list, list]
_IDENTITY = len(Identity._fields)
_STATS = tuple(field.name for field in dataclasses.fields(Stats))
_stats = operator.itemgetter(*_STATS)
_AT = ["shard", "offset", "len", "crc"]
_at = operator.itemgetter(*_AT)
_KINDS = frozenset(KINDS)
_OF_A_DIMENSION = frozenset(("shard", "replicate_or_shard", "head_tail"))
_PLACES = frozenset(("replicate", "partial", "unknown", "flat", *_OF_A_DIMENSION))
_KNOWN = frozenset((
    *_WHAT, *_STATS, *_AT, "t", "at", "stats", "same", "loss_scale", "from", "reason", "against", "count",
    "name", "index", "size", "place", "given", "dim", *_OF_A_DIMENSION, "flat",
))  # fmt: skip

# Older versions wrote `recompute`, always false, and the `offset` of a shard, always null. Neither is read.

_scan = json.JSONDecoder().scan_once


def reason(error: Exception) -> str:
    """Why a line, or a file, is not taken."""
    if isinstance(error, KeyError):
        return f"it lacks {error}"
    if isinstance(error, RecursionError):
        return "it is nested too deep"
    return "a field of it has another type" if isinstance(error, TypeError) else str(error) or type(error).__name__


def decode(text: str) -> dict[str, Any]:
    """The object inside of a line. ValueError, and RecursionError where it is nested too deep."""
    try:
        raw, end = _scan(text, 0) if text[:1] == "{" else (None, 0)
    except json.JSONDecodeError:
        raise
    except ValueError:  # more digits than Python makes an integer of
        raise ValueError("a number in it is out of range") from None
    if end != len(text):
        raise ValueError("it is not one object")
    # An escape may hide what is not allowed.
    return strict(text) if "\\" in text else raw


def strict(text: str | bytes) -> Any:
    """JSON as Rust's serde_json takes it. ValueError also for a field that is there twice, and for half a character."""
    raw = json.loads(
        text, object_pairs_hook=_once, parse_int=_integer, parse_float=_float, parse_constant=_no_number
    )
    level, depth = [raw], 0
    while level:
        depth += 1
        if depth > _limits.DEPTH + 1:
            raise ValueError(f"it is nested more than {_limits.DEPTH} deep")
        inside = [value for value in level if isinstance(value, dict | list)]
        level = [v for value in inside for v in (value.values() if isinstance(value, dict) else value)]
    try:
        json.dumps(raw, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("a text in it has half of a surrogate pair") from None
    return raw


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found and key in _KNOWN:
            raise ValueError(f"it has {key} twice")
        found[key] = value
    return found


def _integer(digits: str) -> int | float:
    # What 64 bits cannot hold is a floating-point number to serde_json, and -0 is one too.
    return _float(digits) if len(digits) > 20 or digits == "-0" else int(digits)


def _float(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError("a number in it is out of range")
    return number


def _no_number(word: str) -> Any:
    raise ValueError(f"{word} is no number in JSON")


def part(text: str, raw: dict[str, Any], folder: str) -> tuple[Identity, Part]:
    """A line of the kind `part`; `folder` goes before its shard's name."""
    identity, (shape, elements), (axes, quotes), (class_name, group, dtype, rank, dp_size, time_ns) = _what_of(raw)
    at, stats, same, scale = raw.get("at"), raw.get("stats"), raw.get("same"), raw.get("loss_scale", 1.0)
    keys = 18 + sum([name in raw for name in ("recompute", "at", "stats", "same", "loss_scale", "from")])
    quotes += 2 * (keys + 7 + (type(scale) is str))
    if elements * SIZES[dtype] > _limits.BYTES:
        raise ValueError(f"its shape {list(shape)} is that of no tensor")
    if at is not None:
        at, quotes = _location(at, folder), quotes + 2 * (len(_AT) + 1)
    if stats is not None:
        stats, quotes = _statistics(stats), quotes + 2 * len(_STATS)
    if same is not None:
        number(same, "same", 32)
    if type(scale) is not float or scale - scale != 0.0:
        scale = _scale(scale)
    origin(raw.get("from"))
    # A field that is there twice, or is not known, has quotation marks too many: is it one that may not be?
    if text.count('"') != quotes:
        strict(text)
    return identity, tuple.__new__(
        Part, (rank, dtype, shape, axes, at, class_name, group, dp_size, scale, time_ns, stats, same)
    )


def what(text: str, raw: dict[str, Any]) -> tuple[Identity, int]:
    """The tensor that a refusal or a divergence is about, and the rank."""
    strict(text)
    identity, _, _, (_, _, _, rank, *_) = _what_of(raw)
    _scale(raw.get("loss_scale", 1.0))
    origin(raw.get("from"))
    return identity, rank


def origin(value: Any) -> None:
    """The slab that something came through and its number there, or null: for agents, which look what is stored."""
    if value is not None:
        if type(value) is not list or len(value) != 2:
            raise ValueError("its from is no pair")
        for each in value:
            number(each, "from", 64)


def _what_of(raw: dict[str, Any]) -> tuple[Any, ...]:
    values = _what(raw)
    if list(map(type, values)) != _WHAT_TYPES:
        raise ValueError(_mistyped(values))
    *_, class_name, group, dtype, rank, dp_size, _, dims, axes = values
    if (rank | dp_size) >> 32:
        raise ValueError("a number in it is out of range")
    for name in (class_name, group):
        words(name, "a name")
    if dtype not in SIZES:
        raise ValueError(f"its dtype {dtype!r} is unknown; install a newer flexmodel")
    shape = _shape(*dims)
    layout = _axes(axes, len(dims)) if axes else _NO_AXES
    return _identity(values[:_IDENTITY], values[_IDENTITY + 5]), shape, layout, values[_IDENTITY:_IDENTITY + 6]


def _identity(values: tuple[Any, ...], time_ns: int) -> Identity:
    """Of values that have their types."""
    module, kind, path, model, step, micro, call, repeat, _ = values
    if (model | micro | call | repeat) >> 32 or (step | time_ns) >> 64:
        raise ValueError("a number in it is out of range")
    if len(module) + len(path) > _limits.TEXT:
        words(module, "a name")
        words(path, "a name")
    if kind not in _KINDS:
        raise ValueError(f"its kind {kind!r} is unknown; install a newer flexmodel")
    return tuple.__new__(Identity, values)


def usual(text: str, folder: str) -> tuple[Identity, Part] | None:
    """A part from a line as an agent writes it; None for any other line, which `decode` and `part` take.

    What lies between the identity and the time is the same in step after step, and is read once.
    """
    start = text.find(',"class":')
    end = text.find(',"time_ns":', start)
    # No escape hides anything, and these fields are the outermost object's.
    if start < 0 or end < 0 or "\\" in text or text.count("{", 0, start) != 1:
        return None
    constant = _constant(text[start + 1 : end])
    if constant is None:
        return None
    rest = text[:start] + text[end:]
    raw, length = _scan(rest, 0)
    fields = _VARYING + ("recompute" in raw) + ("from" in raw)
    if length != len(rest) or len(raw) != fields or not ("at" in raw and "stats" in raw) or raw["t"] != "part":
        return None
    values = _varying(raw)
    identity, (time_ns, at, stats) = values[:_IDENTITY], values[_IDENTITY:]
    if list(map(type, values[: _IDENTITY + 1])) != _VARYING_TYPES:
        return None
    quotes = 2 * (fields + 4) + 2 * (len(_AT) + 1) * (at is not None) + 2 * len(_STATS) * (stats is not None)
    if rest.count('"') != quotes:
        return None
    origin(raw.get("from"))
    class_name, group, dtype, shape, rank, axes, dp_size, scale = constant
    at, stats = None if at is None else _location(at, folder), None if stats is None else _statistics(stats)
    return _identity(identity, time_ns), tuple.__new__(
        Part, (rank, dtype, shape, axes, at, class_name, group, dp_size, scale, time_ns, stats, None)
    )


_varying = operator.itemgetter(*_WHAT[:_IDENTITY], "time_ns", "at", "stats")
_VARYING = _IDENTITY + 4  # and `t`
_VARYING_TYPES = [*_WHAT_TYPES[:_IDENTITY], int]


@functools.lru_cache(1 << 14)
def _constant(members: str) -> tuple[Any, ...] | None:
    """From the fields `class` to `loss_scale`; None if there is anything unusual in them."""
    try:
        raw = strict("{" + members + "}")
        if raw.keys() != {"class", "group", "dtype", "shape", "rank", "axes", "dp_size", "loss_scale"}:
            return None
        usual = dict(zip(_WHAT, ("", KINDS[0], "", 0, 0, 0, 0, 0, True), strict=False), time_ns=0)
        _, (shape, elements), (axes, _), (class_name, group, dtype, rank, dp_size, _) = _what_of({**usual, **raw})
        if elements * SIZES[dtype] > _limits.BYTES:
            return None
        return class_name, group, dtype, shape, rank, axes, dp_size, _scale(raw["loss_scale"])
    except (KeyError, TypeError, ValueError, RecursionError):
        return None  # its line is looked at again, and says why


def _mistyped(values: tuple[Any, ...]) -> str:
    pairs = zip(_WHAT, values, _WHAT_TYPES, strict=True)
    name, value, wanted = next((n, v, t) for n, v, t in pairs if type(v) is not t)
    return f"its {name} is of type {type(value).__name__}, not {wanted.__name__}"


def words(value: Any, name: str) -> str:
    """A text that is not too long."""
    if type(value) is not str:
        raise ValueError(f"its {name} is of type {type(value).__name__}, not str")
    if len(value) > _limits.TEXT:
        raise ValueError(f"it has {name} of {len(value)} characters")
    return value


def number(value: Any, name: str, bits: int) -> int:
    """An unsigned integer."""
    if type(value) is not int:
        raise ValueError(f"its {name} is of type {type(value).__name__}, not int")
    if value >> bits:
        raise ValueError(f"its {name} is out of range")
    return value


def _scale(value: Any) -> float:
    """JSON has no number for a scale that is infinite or none; null is what older versions wrote for them."""
    if _is_finite(value):
        return float(value)
    if value is None or (type(value) is str and value in _NOT_FINITE):
        return _NOT_FINITE[value]
    raise ValueError("its loss scale is no number")


def _is_finite(value: Any) -> bool:
    return value - value == 0 if type(value) in (float, int) else False


@functools.lru_cache(4096, typed=True)
def _shape(*dims: Any) -> tuple[tuple[int, ...], int]:
    """A shape, and how many elements it has where dimensions of size 0 count as 1."""
    if len(dims) > _limits.DIMS:
        raise ValueError(f"it has a tensor of {len(dims)} dimensions")
    for dim in dims:
        number(dim, "shape", 64)
    return dims, math.prod([dim or 1 for dim in dims])


def _location(raw: Any, folder: str) -> Location:
    if type(raw) is not dict:
        raise ValueError("its at is no object")
    shard, offset, nbytes, crc = _at(raw)
    if not (type(shard) is str and type(offset) is type(nbytes) is type(crc) is int):
        raise ValueError("its at has a field of another type")
    if offset >> 63 or nbytes >> 63 or offset + nbytes >> 63 or crc >> 32:
        raise ValueError("its bytes lie outside of every file")
    if len(shard) > _limits.TEXT:
        words(shard, "a name")
    return tuple.__new__(Location, (folder + shard, offset, nbytes, crc))


def _statistics(raw: Any) -> tuple[Any, ...]:
    if type(raw) is not dict:
        raise ValueError("its stats are no object")
    try:
        count, mean, std, l2, absmax, low, high, nan, inf, zero = values = _stats(raw)
    except KeyError:  # a value that is not known may be left out
        count, mean, std, l2, absmax, low, high, nan, inf, zero = values = tuple(
            [raw[n] if n in ("count", "nan", "inf", "zero") else raw.get(n) for n in _STATS]
        )
    if not (type(count) is type(nan) is type(inf) is type(zero) is int) or (count | nan | inf | zero) >> 64:
        raise ValueError("its stats have a count that is none")
    for x in (mean, std, l2, absmax, low, high):
        if x is not None and (type(x) is not float or x - x != 0.0) and not _is_finite(x):
            raise ValueError("its stats have a value that is no number")
    return values


_NO_AXES: tuple[tuple[Axis, ...], int] = ((), 0)


def _axes(raw: list[Any], ndim: int) -> tuple[tuple[Axis, ...], int]:
    """The layout, and how many quotation marks it takes if nothing else is said of it."""
    if len(raw) == 1:
        known, quotes = _axis(raw[0], ndim)
        return (known,), quotes
    if len(raw) > _limits.AXES:
        raise ValueError(f"it has {len(raw)} mesh axes")
    for axis in raw:
        if type(axis) is dict and type(place := axis["place"]) is dict and "flat" in place:
            ndim = len(_flat_shape(place["flat"]))  # where a part is a run of elements, dimensions are the tensor's
            break
    pairs = [_axis(axis, ndim) for axis in raw]
    return tuple([known for known, _ in pairs]), sum([quotes for _, quotes in pairs])


def _flat_shape(how: Any) -> tuple[int, ...]:
    shape = how["shape"] if type(how) is dict else None
    if type(shape) is not list:
        raise ValueError("it lies flat in no shape")
    return _shape(*shape)[0]


def _axis(raw: Any, ndim: int) -> tuple[Axis, int]:
    if type(raw) is not dict:
        raise ValueError("a mesh axis of it is no object")
    place, dim, shape, quotes = raw["place"], -1, None, 12 if "given" in raw else 10
    if type(place) is str:
        quotes += 2
    else:
        ((place, how),) = place.items()
        quotes += 2
        if place == "flat":
            shape, quotes = _flat_shape(how), quotes + 2
        elif place in _OF_A_DIMENSION:
            if type(how) is not dict:
                raise ValueError(f"a {place} of it is no object")
            dim = how["dim"]
            quotes += 2 * len(how)
        elif how is not None:
            place = ""
    given = raw.get("given")
    return _known_axis(raw["name"], raw["index"], raw["size"], place, dim, shape, given, ndim), quotes


@functools.lru_cache(4096, typed=True)
def _known_axis(
    name: Any, index: Any, size: Any, place: str, dim: Any, shape: tuple[int, ...] | None, given: Any, ndim: int
) -> Axis:
    """Axes are few and parts are many: one object for all that are equal."""
    words(name, "an axis")
    number(index, name, 32)
    number(size, name, 32)
    if given is not None:
        number(given, name, 32)
    if index >= size:
        raise ValueError(f"it says {name} {index} of {size}")
    if place not in _PLACES or (place in _OF_A_DIMENSION) != (dim != -1) or (place == "flat") != (shape is not None):
        raise ValueError(f"how it lies along {name} is not known; install a newer flexmodel")
    if dim != -1 and number(dim, "dim", 32) >= ndim:
        raise ValueError(f"it shards dimension {dim} of a tensor that has {ndim}")
    return Axis(name, index, size, place, dim, shape, given)
