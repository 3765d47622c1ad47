"""`torch.distributed`: models are looked at again whenever this process has become a rank, or another one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from ..patches import follow, replace
from .adapter import Adapter

# Each has the function by which a process becomes a rank.
_MODULES = ("torch.distributed", "torch.distributed.distributed_c10d", "torch.distributed.device_mesh")


class Distributed(Adapter):
    """Follows `init_process_group`, under each name that it has."""

    imports = _MODULES

    def watches(self) -> list[tuple[Sequence[str], Callable[[], object]]]:
        return [(_MODULES, self._follow)]

    def _follow(self) -> None:
        first: Any
        first, *others = map(sys.modules.__getitem__, _MODULES)
        original = first.init_process_group
        follow(first, "init_process_group", self.job.guard, after=lambda *_: self.job.joined())
        for module in others:
            if getattr(module, "init_process_group", None) is original:
                replace(module, "init_process_group", first.init_process_group)
