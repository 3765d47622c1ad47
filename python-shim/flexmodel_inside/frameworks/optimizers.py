"""The clock: the step of any optimizer of torch's ends a step of the job."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .adapter import Adapter

_MODULE = "torch.optim.optimizer"


class Optimizers(Adapter):
    """Parameters and gradients are read just before the optimizer's step."""

    imports = (_MODULE,)

    def watches(self) -> list[tuple[Sequence[str], Callable[[], object]]]:
        return [((_MODULE,), self._follow)]

    def _follow(self) -> None:
        from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

        register_optimizer_step_pre_hook(self.job.guard(self.job.before_step, "what an optimizer steps with"))
        register_optimizer_step_post_hook(self.job.guard(self.job.after_step, "the step of an optimizer"))
