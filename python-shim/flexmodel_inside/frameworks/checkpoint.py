"""`torch.distributed.checkpoint`: it makes the state of an optimizer by a step that changes nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from .adapter import Adapter

_MODULE = "torch.distributed.checkpoint.state_dict"


class Checkpoint(Adapter):
    """That step is none of the job's."""

    imports = (_MODULE,)

    def watches(self) -> list[tuple[Sequence[str], Callable[[], object]]]:
        return [((_MODULE,), self._follow)]

    def _follow(self) -> None:
        self.job.clock.makes_states(sys.modules[_MODULE], "_init_optim_state")
