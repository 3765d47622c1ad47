"""Who this process is in the job."""

from __future__ import annotations

import multiprocessing
import os
import sys


def rank_and_world() -> tuple[int, int] | None:
    """Global rank and number of ranks; None for a helper process of the job, such as a DataLoader worker.

    A process that multiprocessing started inherits its parent's environment, so only torch.distributed can tell
    whether it is a rank.
    """
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    if multiprocessing.parent_process() is not None:
        return None
    try:
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except (KeyError, ValueError):
        return 0, 1
    return (rank, world) if 0 <= rank < world else (0, 1)
