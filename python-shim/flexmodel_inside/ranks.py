"""Who this process is in the job."""

from __future__ import annotations

import multiprocessing
import os
import sys

# wire::env::RANK_PROCESS.
_RANK_PROCESS = "FLEXMODEL_RANK_PROCESS"


def rank_and_world() -> tuple[int, int] | None:
    """Global rank and number of ranks; None for a helper process of the job, such as a DataLoader worker.

    A process that multiprocessing started inherits its parent's environment, so only torch.distributed knows
    whether it is a rank.
    """
    if _joined():
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
    made_rank = os.environ.get("RANK", "") != its_rank or (multiprocessing.parent_process() is not None and _joined())
    return None if size == 1 and made_rank else pid


def _joined() -> bool:
    dist = sys.modules.get("torch.distributed")
    return dist is not None and dist.is_available() and dist.is_initialized()
