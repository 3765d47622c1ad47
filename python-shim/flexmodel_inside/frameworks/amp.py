"""By how much torch's `GradScaler` scales the loss before it goes backward: gradients are multiplied by that too. And
the steps that it skips.

A backward pass has the scale of the loss that it begins with: one whose loss was not scaled, as an attack's before the
training pass, has none. A scale is on a device as a rule, and the job goes on while that computes: so it leaves the
device when the scaler has updated it, and is read when the next gradient needs it.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..patches import follow, given
from .adapter import Adapter, Job

_MODULE = "torch.amp.grad_scaler"

# By scaler: its tensor, how often that had changed, and the scale in it then.
_known: weakref.WeakKeyDictionary[Any, tuple[torch.Tensor | None, int, Any]] = weakref.WeakKeyDictionary()


class Amp(Adapter):
    """torch's own scaler."""

    imports = (_MODULE,)

    def watches(self) -> list[tuple[Sequence[str], Callable[[], object]]]:
        return [((_MODULE,), self._follow)]

    def _follow(self) -> None:
        scaler, guard, clock = sys.modules[_MODULE].GradScaler, self.job.guard, self.job.clock  # type: ignore[attr-defined]
        # How often optimizers had stepped when scalers were to step them.
        before: dict[int, int] = {}

        def steps(*call: Any) -> None:
            optimizer = given(*call, 1, "optimizer")
            before[id(optimizer)] = clock.steps_of(optimizer)

        def stepped(_: Any, *call: Any) -> None:
            optimizer = given(*call, 1, "optimizer")
            # Torch calls our hooks for those alone that have its step.
            hooked = getattr(type(optimizer).step, "hooked", False)
            if clock.steps_of(optimizer) == before.pop(id(optimizer), None) and hooked:
                clock.skipped_step(optimizer)

        follow(scaler, "step", guard, before=steps, after=stepped)
        follow_scale(self.job, _MODULE, "GradScaler")


def follow_scale(job: Job, module: str, name: str) -> None:
    """Tell the scale of each loss that a scaler of this class scales, while gradients are wanted at all. The class may
    have its own way to scale, and to update."""

    def updated(_: Any, *call: Any) -> None:
        scaler = given(*call, 0, "self")
        if scaler.is_enabled() and job.wants_gradients():
            _look(job, scaler)
        else:
            _known.pop(scaler, None)

    def scaled(losses: Any, *call: Any) -> None:
        scaler = given(*call, 0, "self")
        if scaler.is_enabled() and job.wants_gradients():
            job.scaled(losses, _look(job, scaler))

    scaler_class = getattr(sys.modules[module], name)
    follow(scaler_class, "scale", job.guard, after=scaled)
    follow(scaler_class, "update", job.guard, after=updated)


def _look(job: Job, scaler: Any) -> Any:
    """The scale that a scaler has now. Nobody waits for it before it is read."""
    tensor = scaler._get_scale_async()
    changes = 0 if tensor is None else tensor._version
    known = _known.get(scaler)
    if known is None or known[0] is not tensor or known[1] != changes:
        # Where there is no tensor yet, it is a number.
        known = tensor, changes, job.scale(scaler.get_scale() if tensor is None else tensor)
        _known[scaler] = known
    return known[2]
