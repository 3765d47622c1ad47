"""Who this process is in the job."""

from __future__ import annotations

import multiprocessing
import os
import sys
import weakref
from typing import Any

# wire::env::RANK_PROCESS.
_RANK_PROCESS = "FLEXMODEL_RANK_PROCESS"
MODULE = "torch.distributed.distributed_c10d"
# Under which the ranks of a process group draw its number. A launcher that starts ranks again may keep the store, with
# what the attempt before left in it.
_DRAWN = "flexmodel/group/"
# Stores that answer at once.
_STORES = ("TCPStore", "FileStore", "HashStore")


def rank_and_world() -> tuple[int, int] | None:
    """Global rank and number of ranks; None for a helper process of the job, such as a DataLoader worker.

    A process that multiprocessing started inherits its parent's environment, so only torch.distributed knows
    whether it is a rank.
    """
    if is_joined():
        dist = sys.modules["torch.distributed"]
        return dist.get_rank(), dist.get_world_size()
    if multiprocessing.parent_process() is not None:
        return None
    try:
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except (KeyError, ValueError):
        return 0, 1
    return (rank, world) if 0 <= rank < world else (0, 1)


def sign(world: int) -> None:
    """Let the processes that this one starts know that it captures, as a rank of `world`."""
    signature = f"{os.getpid()}:{world}:{os.environ.get('RANK', '')}"
    if os.environ.get(_RANK_PROCESS) != signature:
        os.environ[_RANK_PROCESS] = signature


def started_by_rank(world: int) -> int | None:
    """The capturing process that started this one without making it a rank of its own; None if there is none.

    All ranks of a world of several are there already: what they start is a rank only of a larger one. What a process
    alone starts may be the job itself, if a launcher gave it a rank, or if multiprocessing started it and it joined.
    """
    try:
        process, its_world, its_rank = os.environ[_RANK_PROCESS].split(":")
        pid, size = int(process), int(its_world)
    except (KeyError, ValueError):
        return None
    if pid == os.getpid() or world > size:
        return None
    made_rank = os.environ.get("RANK", "") != its_rank or (multiprocessing.parent_process() is not None and is_joined())
    return None if size == 1 and made_rank else pid


class Group:
    """The default process group of this process, and the number that its ranks have drawn: all have the same, whenever
    they look, and no other group has. It tells their job from others, and an attempt of it from other attempts."""

    def __init__(self) -> None:
        # Weak: while anything holds a group that the job destroyed, its threads and sockets live on.
        self._group: weakref.ref[Any] | None = None
        self._number = 0

    def joined(self) -> None:
        """This process has joined one now: its store is there, and answers without a wait for any rank."""
        self._number, self._group = 0, None
        if is_joined():
            c10d: Any = sys.modules[MODULE]
            self._group = weakref.ref(c10d._get_default_group())
            self._number = _draw(c10d)

    def number(self) -> int:
        """Its number; 0 where there is none."""
        here = is_joined() and self._group is not None and self._group() is sys.modules[MODULE]._get_default_group()
        return self._number if here else 0


def store_of(c10d: Any) -> Any:
    """The store of the default process group, without prefixes."""
    store = c10d._get_default_store()
    while isinstance(store, c10d.PrefixStore):
        store = store.underlying_store
    return store


def _draw(c10d: Any) -> int:
    """The number that the rank which came first has put into the store; 0 where there is no such store."""
    if type(store_of(c10d)).__name__ not in _STORES:
        return 0
    key = _DRAWN + os.environ.get("TORCHELASTIC_RESTART_COUNT", "")
    try:
        return int(c10d._get_default_store().compare_set(key, "", os.urandom(8).hex()), 16)
    except (RuntimeError, ValueError):  # it went with another rank
        return 0


def is_joined() -> bool:
    """Whether this process has a default process group."""
    dist = sys.modules.get("torch.distributed")
    return dist is not None and dist.is_available() and dist.is_initialized()
