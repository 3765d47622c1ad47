"""What ends a step of the job: optimizers that step or are skipped, and backward passes where there is no optimizer."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .holders import Holders
from .parameters import ParameterTaps


class Clock:
    """Tells the engine, which counts, and has parameters and gradients captured in time."""

    def __init__(
        self, bridge: Any, holders: Holders, parameter_taps: ParameterTaps, after_step: Callable[[], object]
    ) -> None:
        self._bridge = bridge
        self._holders = holders
        self._parameter_taps = parameter_taps
        self._after_step = after_step
        self._stepped: weakref.WeakKeyDictionary[torch.optim.Optimizer, int] = weakref.WeakKeyDictionary()
        self._ignoring = False

    def optimizer_made(self, optimizer: torch.optim.Optimizer) -> None:
        """The job made an optimizer, or gave it more parameters."""
        self._holders.made(optimizer)

    def before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        """An optimizer is about to step; other arguments for that, if it is to have any."""
        return None if self._ignoring else self._parameter_taps.before_step(optimizer, args, kwargs)

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """It has stepped."""
        if not self._ignoring:
            self._stepped[optimizer] = self.steps_of(optimizer) + 1
            self._end(optimizer)

    def steps_of(self, optimizer: torch.optim.Optimizer) -> int:
        """How often an optimizer has stepped."""
        return self._stepped.get(optimizer, 0)

    def skipped_step(self, optimizer: torch.optim.Optimizer) -> None:
        """It was to step with the gradients that there are, and did not."""
        self._parameter_taps.before_skipped(optimizer)
        self._end(optimizer)

    def backward_ended(self) -> None:
        """A backward pass ended."""
        self._bridge.backward_ended()

    @contextlib.contextmanager
    def no_steps(self) -> Iterator[None]:
        """While in it, steps of optimizers are none of the job's."""
        self._ignoring = True
        try:
            yield
        finally:
            self._ignoring = False

    def _end(self, optimizer: torch.optim.Optimizer) -> None:
        self._bridge.stepped(self._holders.number(optimizer))
        self._after_step()
