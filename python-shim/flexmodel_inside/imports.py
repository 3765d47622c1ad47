"""Calls back when modules have been imported, without taking part in importing them.

Python walks `sys.meta_path` while it asks our finder, and so may other threads: an entry taken out then makes it pass
over the next one. So our finder goes in once, at the front, and stays; it is never moved or removed. The job may do so:
then `look` calls back a little later.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

_waiting: list[tuple[Sequence[str], Callable[[], object]]] = []
_watching = False


def when_imported(names: Sequence[str], then: Callable[[], object]) -> None:
    """Call `then` once all of `names` are imported: now, or before the next import after that."""
    global _watching
    _waiting.append((names, then))
    if not _watching:
        _watching = True
        sys.meta_path.insert(0, _Watcher)  # type: ignore[arg-type]
    look()


def look() -> None:
    """Call what no longer has to wait."""
    for entry in [e for e in _waiting if all(map(_done, e[0]))]:
        try:
            _waiting.remove(entry)
        except ValueError:  # another thread was quicker
            continue
        entry[1]()


def _done(name: str) -> bool:
    module = sys.modules.get(name)
    try:
        return module is not None and not getattr(getattr(module, "__spec__", None), "_initializing", False)
    except Exception:  # what the job put there in its place
        return False


class _Watcher:
    """A finder that finds nothing; Python asks it at every new import."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> None:
        look()
