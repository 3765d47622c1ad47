"""The store of the job's process group, in which the ranks of several nodes decide on a change of hooks.

It is opened once for each process group, over a connection of our own and under a prefix of ours that has the group's
number: a launcher may keep its store for the ranks that it starts next. What is done in it is the engine's affair, on a
thread of its own that needs no GIL.
"""

from __future__ import annotations

import os
import sys
import weakref
from typing import Any

from .ranks import MODULE, Group, is_joined, store_of

_PREFIX = "flexmodel/hooks/"


class JobStore:
    """Gives the engine the store of the default process group, where that may have ranks on several nodes."""

    def __init__(self, bridge: Any, group: Group) -> None:
        self._bridge = bridge
        self._drawn = group
        # Weak: while anything holds a group that the job destroyed, its threads and sockets live on.
        self._group: weakref.ref[Any] | None = None

    def open(self) -> None:
        """Once for each group."""
        if not is_joined():
            return
        c10d: Any = sys.modules[MODULE]
        group, world = c10d._get_default_group(), c10d.get_world_size()
        if self._group is not None and self._group() is group:
            return
        self._group = weakref.ref(group)
        # One agent has all ranks, and decides in memory that it shares with them.
        if world < 2 or os.environ.get("LOCAL_WORLD_SIZE") == str(world):
            return
        number = self._drawn.number()
        if not number:
            self._absent(f"is a {type(store_of(c10d)).__name__}, which does not answer at once")
            return
        try:
            self._bridge.store(c10d.PrefixStore(f"{_PREFIX}{number:x}", c10d._get_default_store().clone()))
        except Exception as e:
            what = str(e).splitlines()[0] if str(e) else type(e).__name__
            self._absent(f"takes no connection of ours ({what})")

    def _absent(self, why: str) -> None:
        self._bridge.no_store(f"the job's store {why}: hooks cannot be changed over several nodes")
