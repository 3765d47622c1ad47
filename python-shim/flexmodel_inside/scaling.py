"""By how much the job scales the loss before it goes backward: gradients are multiplied by that too.

A scale is read where it is at hand, never from a device while the job is computing: a GradScaler has told its own after
`update`, which waits for the device anyway.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch

from .pipelines import MEGATRON, MEGATRON_PIPELINES, MEGATRON_WHOLE, before

GRAD_SCALER = "torch.amp.grad_scaler"
SHARDED = "torch.distributed.fsdp.sharded_grad_scaler"
DEEPSPEED = "deepspeed.runtime.engine"


class Scaling:
    """Tells every new scale."""

    def __init__(self, tell: Callable[[float], None]) -> None:
        self._tell = tell
        # What scalers said after their last update.
        self._known: weakref.WeakKeyDictionary[Any, float] = weakref.WeakKeyDictionary()

    def watch_scaler(self) -> None:
        """Follow torch's GradScaler."""
        cls = sys.modules[GRAD_SCALER].GradScaler  # type: ignore[attr-defined]
        original, known = cls.update, self._known

        @functools.wraps(original)
        def update(self: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(self, *args, **kwargs)
            if self.is_enabled():
                known[self] = self.get_scale()
            return result

        cls.update = update
        self._watch_scale(cls)

    def watch_sharded_scaler(self) -> None:
        """Follow the scaler of FSDP1, which scales by itself."""
        self._watch_scale(sys.modules[SHARDED].ShardedGradScaler)  # type: ignore[attr-defined]

    def _watch_scale(self, cls: Any) -> None:
        original, known, tell = cls.scale, self._known, self._tell

        @functools.wraps(original)
        def scale(self: Any, outputs: Any) -> Any:
            if self.is_enabled():
                tell(known.get(self, self._init_scale))
            return original(self, outputs)

        cls.scale = scale

    def watch_deepspeed(self) -> None:
        """Follow DeepSpeed's engine, which also divides the loss by the number of accumulation steps."""
        cls = sys.modules[DEEPSPEED].DeepSpeedEngine  # type: ignore[attr-defined]
        original, tell = cls.backward, self._tell

        @functools.wraps(original)
        def backward(self: Any, loss: Any, *args: Any, **kwargs: Any) -> Any:
            # backward(loss, retain_graph=False, scale_wrt_gas=True)
            divided = kwargs.get("scale_wrt_gas", args[1] if len(args) > 1 else True)
            scale = getattr(self.optimizer, "loss_scale", None) or 1.0
            tell(float(scale) / (self.gradient_accumulation_steps() if divided else 1))
            return original(self, loss, *args, **kwargs)

        cls.backward = backward

    def watch_megatron(self, guard: Callable[[Any], Any]) -> None:
        """Follow the schedules of megatron-core, which divide the loss of a microbatch by how many these are, unless it
        is a sum over tokens. A scale on top of that is read once in a step, before it computes anything."""

        @guard
        def begin(given: dict[str, Any]) -> None:
            models = given["model"]
            model = models[0] if isinstance(models, list) else models
            config = sys.modules["megatron.core.utils"].get_model_config(model)  # type: ignore[attr-defined]
            scale = config.grad_scale_func
            divisor = 1 if getattr(config, "calculate_per_token_loss", False) else given["num_microbatches"]
            self._tell((1.0 if scale is None else float(scale(torch.ones(())))) / divisor)

        for name in (*MEGATRON_PIPELINES, MEGATRON_WHOLE):
            before(sys.modules[MEGATRON], name, begin)
