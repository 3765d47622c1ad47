"""The clock: the step of any optimizer of torch's ends a step of the job, and where there is none, a backward pass."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..patches import follow, given
from .adapter import Adapter

_MODULE = "torch.optim.optimizer"


# Of our hook among an optimizer's own, which never have it.
_KEY = -1


class Optimizers(Adapter):
    """Parameters and gradients are read just before the optimizer's step, after all hooks of the job's."""

    imports = (_MODULE,)

    def watches(self) -> list[tuple[Sequence[str], Callable[[], object]]]:
        return [((_MODULE,), self._follow)]

    def _follow(self) -> None:
        from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

        guard = self.job.guard
        last = guard(self.job.clock.before_step, "what an optimizer steps with")

        def begin(optimizer: Any, args: Any, kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                return last(optimizer, args, kwargs)
            # Torch calls global hooks first, and may find others in the optimizer, one that clips gradients, say.
            own = optimizer._optimizer_step_pre_hooks
            own.pop(_KEY, None)
            own[_KEY] = last
            return None

        def end(optimizer: Any, args: Any, kwargs: Any) -> None:
            optimizer._optimizer_step_pre_hooks.pop(_KEY, None)
            self.job.clock.after_step(optimizer)

        def made(_: Any, *call: Any) -> None:
            self.job.clock.optimizer_made(given(*call, 0, "self"))

        cls = sys.modules[_MODULE].Optimizer  # type: ignore[attr-defined]
        for name in ("__init__", "add_param_group"):
            follow(cls, name, guard, after=made)
        for name in ("backward", "grad"):
            follow(torch.autograd, name, guard, after=lambda *_: self.job.clock.backward_ended())
        register_optimizer_step_pre_hook(guard(begin, "what an optimizer steps with"))
        register_optimizer_step_post_hook(guard(end, "the step of an optimizer"))
