"""The clock: the step of any optimizer of torch's ends a step of the job, and where there is none, a backward pass."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..patches import follow, given, wrap
from .adapter import Adapter

_MODULE = "torch.optim.optimizer"


# The key of our hook among an optimizer's own. Torch's keys are not negative.
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

        def of(function: Callable[[torch.optim.Optimizer], None]) -> Callable[..., None]:
            return lambda _, args, kwargs: function(given(args, kwargs, 0, "self"))

        cls = sys.modules[_MODULE].Optimizer  # type: ignore[attr-defined]
        follow(cls, "__init__", guard, after=of(self.job.clock.optimizer_made))
        follow(cls, "add_param_group", guard, after=of(self.job.clock.parameters_added))
        # Both `backward` and `grad` call it. These themselves are known to torch.jit by what they are.
        if hasattr(torch.autograd, "_engine_run_backward"):
            begins = guard(self.job.clock.backward_begins, "the beginning of a backward pass")
            ended = guard(self.job.clock.backward_ended, "the end of a backward pass")
            wrap(torch.autograd, "_engine_run_backward", lambda run: _followed(run, begins, ended))
        register_optimizer_step_pre_hook(guard(begin, "what an optimizer steps with"))
        register_optimizer_step_post_hook(guard(end, "the step of an optimizer"))


def _followed(
    run: Callable[..., Any], begins: Callable[[], Any], ended: Callable[[bool, Any], object]
) -> Callable[..., Any]:
    def followed(*args: Any, **kwargs: Any) -> Any:
        # `torch.autograd.grad` gives gradients to who asks, and leaves none.
        leaves = kwargs.get("accumulate_grad", False)
        has_left, found = False, begins() if leaves else None
        try:
            result = run(*args, **kwargs)
            has_left = leaves
            return result
        finally:
            ended(has_left, found)

    return followed
