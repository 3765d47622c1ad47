"""By how much torch's `GradScaler` scales the loss before it goes backward: gradients are multiplied by that too. And
the steps that it skips.

A backward pass has the scale of the loss that it begins with: one whose loss was not scaled, as an attack's before the
training pass, has none. A scale is never read from a device while the job computes: `update` waits for the device
anyway, and the scaler is asked after that.
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

# What scalers said after their last update.
_known: weakref.WeakKeyDictionary[Any, float] = weakref.WeakKeyDictionary()


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
    """Tell the scale of each loss that a scaler of this class scales, while gradients are wanted at all: it may be on a
    device, where to look at it makes the job wait. The class may have its own way to scale, and to update."""

    def updated(_: Any, *call: Any) -> None:
        of = given(*call, 0, "self")
        if not job.wants_gradients():
            _known.pop(of, None)
        elif of.is_enabled():
            _known[of] = of.get_scale()

    def scaled(losses: Any, *call: Any) -> None:
        scaler = given(*call, 0, "self")
        if scaler.is_enabled() and job.wants_gradients():
            if scaler not in _known:
                _known[scaler] = scaler.get_scale()
            mark(losses, _known[scaler])

    def mark(losses: Any, scale: float) -> None:
        if isinstance(losses, torch.Tensor):
            job.bridge.scaled(losses, scale)
        elif isinstance(losses, (list, tuple)):
            for loss in losses:
                mark(loss, scale)

    scaler_class = getattr(sys.modules[module], name)
    follow(scaler_class, "scale", job.guard, after=scaled)
    follow(scaler_class, "update", job.guard, after=updated)
