"""`run.json`, as `agent/run/src/format.rs` defines it: its values are of their types, or it is not taken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from . import _limits
from ._lines import strict
from ._text import clip
from ._types import KINDS, ModelInfo, ModuleInfo, Owners, RunInfo, Totals

_T = TypeVar("_T")


def parse(data: bytes) -> RunInfo:
    """What it says; fields that a later version added are left out. ValueError where it is not what it should be."""
    raw = _object(strict(data), "it")
    take = _Fields(raw)
    totals = _Fields(_object(raw.get("totals", {}), "totals"))
    return RunInfo(
        format=take("format", _number, 0), flexmodel=take("flexmodel", _text, ""), command=take("command", _texts, ()),
        hooks=take("hooks", _text, ""), started_ns=take("started_ns", _long, 0),
        finished_ns=take("finished_ns", _optional(_long), None), exit_code=take("exit_code", _optional(_signed), None),
        world=take("world", _number, 0), node=take("node", _text, ""), torch=take("torch", _text, ""),
        python=take("python", _text, ""), wrapper=take("wrapper", _text, ""), models=take("models", _models, ()),
        owners=take("owners", _owners, ()), notices=take("notices", _notices, ()),
        totals=Totals(**{name: totals(name, _long, 0) for name in Totals.__dataclass_fields__}),
    )  # fmt: skip


def version(data: bytes) -> int:
    """The format alone, of one that may not be taken otherwise."""
    return _Fields(_object(strict(data), "it"))("format", _number, 0)


class _Fields:
    def __init__(self, raw: dict[str, Any]) -> None:
        self._raw = raw

    def __call__(self, name: str, of: Callable[[Any, str], _T], default: _T) -> _T:
        return of(self._raw[name], name) if name in self._raw else default


def _wrong(value: Any, name: str, wanted: str) -> ValueError:
    return ValueError(f"{name} is {clip(repr(value)[:1000])}, which is no {wanted}")


def _object(value: Any, name: str) -> dict[str, Any]:
    if type(value) is not dict:
        raise _wrong(value, name, "object")
    return value


def _list(value: Any, name: str) -> list[Any]:
    if type(value) is not list:
        raise _wrong(value, name, "array")
    return value


def _text(value: Any, name: str) -> str:
    if type(value) is not str:
        raise _wrong(value, name, "text")
    return value


def _integer(low: int, high: int) -> Callable[[Any, str], int]:
    def take(value: Any, name: str) -> int:
        if type(value) is not int or not low <= value <= high:
            raise _wrong(value, name, f"integer from {low} to {high}")
        return value

    return take


_number, _long = _integer(0, (1 << 32) - 1), _integer(0, (1 << 64) - 1)
_signed = _integer(-1 << 31, (1 << 31) - 1)


def _optional(of: Callable[[Any, str], _T]) -> Callable[[Any, str], _T | None]:
    return lambda value, name: None if value is None else of(value, name)


def _each(value: Any, name: str, of: Callable[[Any, str], _T], limit: int | None = None) -> tuple[_T, ...]:
    if limit is not None and len(_list(value, name)) > limit:
        raise ValueError(f"{name} are {len(value)}, and no more than {limit} are read")
    return tuple([of(item, f"one of {name}") for item in _list(value, name)])


def _texts(value: Any, name: str) -> tuple[str, ...]:
    return _each(value, name, _text)


def _notices(value: Any, name: str) -> tuple[str, ...]:
    return _each(value, name, _text, _limits.NOTICES)


def _models(value: Any, name: str) -> tuple[ModelInfo, ...]:
    return _each(value, name, _model, _limits.MODELS)


def _model(value: Any, name: str) -> ModelInfo:
    raw = _object(value, name)
    return ModelInfo(_number(raw["model"], "model"), _each(raw["modules"], "modules", _module))


def _module(value: Any, name: str) -> ModuleInfo:
    raw = _object(value, name)
    bits = _number(raw["kinds"], "kinds")
    kinds = tuple([kind for bit, kind in enumerate(KINDS) if bits >> bit & 1]) if bits else ()
    return ModuleInfo(_text(raw["name"], "name"), _text(raw["class"], "class"), kinds)


def _owners(value: Any, name: str) -> tuple[Owners, ...]:
    return _each(value, name, _group)


def _group(value: Any, name: str) -> Owners:
    raw = _object(value, name)
    return Owners(
        _optional(_number)(raw.get("model"), "model"),
        _each(raw["ranks"], "ranks", _number),
        _texts(raw["modules"], "modules"),
    )
