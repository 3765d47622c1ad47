"""By how much the job scales the loss before it goes backward: gradients are multiplied by that too.

A scale is read where it is at hand, never from a device while the job is computing: a GradScaler has told its own after
`update`, which waits for the device anyway.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch

from .patches import follow, given
from .pipelines import MEGATRON, MEGATRON_PIPELINES, MEGATRON_WHOLE

GRAD_SCALER = "torch.amp.grad_scaler"
SHARDED = "torch.distributed.fsdp.sharded_grad_scaler"
DEEPSPEED = "deepspeed.runtime.engine"


class Scaling:
    """Tells every new scale."""

    def __init__(self, tell: Callable[[float], None], guard: Callable[..., Any]) -> None:
        self._tell = tell
        # Makes of a function one that raises nothing.
        self._guard = guard
        # What scalers said after their last update.
        self._known: weakref.WeakKeyDictionary[Any, float] = weakref.WeakKeyDictionary()

    def watch_scaler(self) -> None:
        """Follow torch's GradScaler."""
        cls = sys.modules[GRAD_SCALER].GradScaler  # type: ignore[attr-defined]

        def updated(_: Any, *call: Any) -> None:
            scaler = given(*call, 0, "self")
            if scaler.is_enabled():
                self._known[scaler] = scaler.get_scale()

        follow(cls, "update", self._guard, after=updated)
        self._watch_scale(cls)

    def watch_sharded_scaler(self) -> None:
        """Follow the scaler of FSDP1, which scales by itself."""
        self._watch_scale(sys.modules[SHARDED].ShardedGradScaler)  # type: ignore[attr-defined]

    def _watch_scale(self, cls: Any) -> None:

        def scales(*call: Any) -> None:
            scaler = given(*call, 0, "self")
            if scaler.is_enabled():
                self._tell(self._known.get(scaler, scaler._init_scale))

        follow(cls, "scale", self._guard, before=scales)

    def watch_deepspeed(self) -> None:
        """Follow DeepSpeed's engine, which also divides the loss by the number of accumulation steps."""
        cls = sys.modules[DEEPSPEED].DeepSpeedEngine  # type: ignore[attr-defined]

        def begin(*call: Any) -> None:
            # backward(self, loss, retain_graph=False, scale_wrt_gas=True)
            engine, divided = given(*call, 0, "self"), given(*call, 3, "scale_wrt_gas", True)
            scale = getattr(engine.optimizer, "loss_scale", None) or 1.0
            self._tell(float(scale) / (engine.gradient_accumulation_steps() if divided else 1))

        follow(cls, "backward", self._guard, before=begin)

    def watch_megatron(self) -> None:
        """Follow the schedules of megatron-core, which divide the loss of a microbatch by how many these are, unless it
        is a sum over tokens. A scale on top of that is read once in a step, before it computes anything."""

        def begin(_: tuple, given: dict[str, Any]) -> None:
            models = given["model"]
            model = models[0] if isinstance(models, list) else models
            config = sys.modules["megatron.core.utils"].get_model_config(model)  # type: ignore[attr-defined]
            scale = config.grad_scale_func
            divisor = 1 if getattr(config, "calculate_per_token_loss", False) else given["num_microbatches"]
            self._tell((1.0 if scale is None else float(scale(torch.ones(())))) / divisor)

        for name in (*MEGATRON_PIPELINES, MEGATRON_WHOLE):
            follow(sys.modules[MEGATRON], name, self._guard, before=begin)
