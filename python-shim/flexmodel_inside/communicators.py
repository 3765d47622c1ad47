"""A communicator of our own among the ranks of a job, for `assemble=collective`.

It shares nothing with the job's. The ranks meet under a prefix of ours in the store of `init_process_group`, over a
connection of our own. A thread waits until all of them are there with the same hooks. If a rank is missing or has other
hooks, it is named and there is no communicator. Otherwise one is made, with a bound on how long that takes.
"""

from __future__ import annotations

import sys
import threading
import time
import weakref
import zlib
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

MODULE = "torch.distributed.distributed_c10d"
# How long the ranks wait for the last one of them.
_PATIENCE = 30.0
# The longest that one operation may take, and making the communicator: another rank may have stopped.
_OPERATION = timedelta(seconds=60)
_MAKING = timedelta(seconds=10)
# The longest that a process which ends waits for that, and for NCCL's.
_FAREWELL = 25.0
# First and longest pause between two looks.
_LOOK = (0.005, 0.1)
_PREFIX = "flexmodel"
# The plan of a rank that waits no longer.
_GONE = "gone"


class Communicators:
    """Joins the ranks of this process's job, once for as long as hooks want it."""

    def __init__(self, bridge: Any) -> None:
        self._bridge = bridge
        self._thread: threading.Thread | None = None
        # Weak: while anything holds a group that the job destroyed, its threads and sockets live on.
        self._group: weakref.ref[Any] | None = None
        self._ending = threading.Event()

    def join(self, parameters: Callable[[], Iterable[Any]]) -> None:
        """Begin to wait for the other ranks, if hooks want tensors gathered and the job has a process group.
        `parameters` are those of its models."""
        plan = self._bridge.plan()
        if not plan:
            # The engine leaves what there is. Hooks may want it again.
            self._ending.set()
            self._group = None
            return
        c10d = sys.modules.get(MODULE)
        if c10d is None or not c10d.is_initialized() or c10d.get_world_size() < 2:
            return
        group = c10d._get_default_group()
        if self._group is not None:
            if group is not self._group():
                self._bridge.per_rank("the job made another process group")
            return
        self._group = weakref.ref(group)
        try:
            # What is in the store of an earlier time is none of this one's.
            prefix = f"{_PREFIX}/{self._bridge.revision()}"
            store = c10d.PrefixStore(prefix, c10d._get_default_store().clone())
            device = _device(parameters())
        except Exception as e:
            self._bridge.per_rank(_failed(e))
            return
        self._ending = threading.Event()
        place = (c10d.get_rank(), c10d.get_world_size())
        meeting = (self._ending, store, *place, f"{zlib.crc32(plan.encode()):08x}", device)
        self._thread = threading.Thread(target=self._meet, args=meeting, name="flexmodel-join", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """The process ends: wait for the thread, which may be making a communicator, so that it ends before Python."""
        # A fork of the process has no such thread, and it may have been using the event.
        if self._thread is not None and self._thread.is_alive():
            self._ending.set()
            self._thread.join(_FAREWELL)

    def _meet(self, ending: threading.Event, store: Any, rank: int, world: int, plan: str, device: int) -> None:
        try:
            why = _absent(ending, store, rank, world, plan)
            if ending is not self._ending:  # hooks have changed since: nobody waits for this one
                return
            if why is None:
                # torch's own, as it is for a job's Gloo group; not registered with torch, so the job does not see it.
                gloo = sys.modules[MODULE].ProcessGroupGloo(store, rank, world, _MAKING)
                gloo.set_timeout(_OPERATION)
                self._bridge.joined(gloo, rank, world, device)
            else:
                self._bridge.per_rank(why)
        except Exception as e:
            self._bridge.per_rank(_failed(e))


def _absent(ending: threading.Event, store: Any, rank: int, world: int, plan: str) -> str | None:
    """Why there can be no communicator: None if there can, nothing if it was too late for one."""
    store.set(f"plan/{rank}", plan)
    keys = [f"plan/{other}" for other in range(world)]
    deadline = time.monotonic() + _PATIENCE
    pause = _LOOK[0]
    while not store.check(keys):
        if ending.wait(pause) or time.monotonic() > deadline:
            # Whoever comes later need not wait for this rank.
            store.set(keys[rank], _GONE)
            absent = [other for other in range(world) if not store.check([keys[other]])]
            return f"{_ranks(absent)} did not come in time (does every rank have these hooks?)" if absent else ""
        pause = min(2 * pause, _LOOK[1])
    plans = [store.get(key).decode() for key in keys]
    gone = [other for other in range(world) if plans[other] == _GONE]
    others = [other for other in range(world) if plans[other] != plan]
    if gone:
        return f"{_ranks(gone)} did not wait for rank {rank}"
    return f"{_ranks(others)} and rank {rank} have different hooks" if others else None


def _device(parameters: Iterable[Any]) -> int:
    """The device of this process: that of the first parameter that is on one. Where all are elsewhere it is the current
    one, which on all ranks of a script that never sets it is the machine's first; -1 if there is none."""
    for parameter in parameters:
        if parameter.device.type == "cuda":
            return parameter.device.index
    cuda = sys.modules.get("torch.cuda")
    return cuda.current_device() if cuda is not None and cuda.is_initialized() else -1


def _failed(e: Exception) -> str:
    return f"the ranks have no communicator: {str(e).splitlines()[0] if str(e) else type(e).__name__}"


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"rank{'' if len(ranks) == 1 else 's'} {shown}"
