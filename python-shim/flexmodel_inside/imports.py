"""Tells when modules have been imported, without taking part in importing them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

_waiting: list[tuple[Sequence[str], Callable[[], object]]] = []


def when_imported(names: Sequence[str], then: Callable[[], object]) -> None:
    """Call `then` once all of `names` are imported: now, or before the next import after that."""
    _waiting.append((names, then))
    if _Watcher not in sys.meta_path:
        sys.meta_path.insert(0, _Watcher)  # type: ignore[arg-type]
    _look()


def _done(name: str) -> bool:
    module = sys.modules.get(name)
    return module is not None and not getattr(getattr(module, "__spec__", None), "_initializing", False)


def _look() -> None:
    for entry in [e for e in _waiting if all(map(_done, e[0]))]:
        if entry in _waiting:
            _waiting.remove(entry)
            entry[1]()
    if not _waiting and _Watcher in sys.meta_path:
        sys.meta_path.remove(_Watcher)  # type: ignore[arg-type]


class _Watcher:
    """A finder that finds nothing; Python asks it at every new import."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> None:
        _look()
