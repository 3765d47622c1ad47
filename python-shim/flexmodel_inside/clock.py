"""What ends a step of the job: optimizers that step or are skipped, and backward passes where there is no optimizer."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable, Iterator, Set
from typing import Any

import torch
import torch._guards

from .holders import Holders
from .parameters import ParameterTaps, Versions
from .patches import wrap


class Clock:
    """Tells the engine, which counts steps, what ends one, and has parameters and gradients captured before that."""

    def __init__(
        self,
        bridge: Any,
        holders: Holders,
        parameter_taps: ParameterTaps,
        after_step: Callable[[], object],
        turn: Callable[[], object],
    ) -> None:
        self._bridge = bridge
        self._holders = holders
        self._parameter_taps = parameter_taps
        self._after_step = after_step
        # Called when a step has ended, and other hooks may begin with the next.
        self._turn = turn
        # How often each optimizer has stepped, by number.
        self._stepped: collections.Counter[int] = collections.Counter()
        # How many steps have ended.
        self._ended = 0
        self._ignoring = 0

    def compiler_is_here(self) -> None:
        """torch.compile is in use. In a function that it compiles, what ends a step is one call that it does not look
        into: whatever is different in a step, the graphs stay."""
        self.after_step = torch._dynamo.disable(self.after_step)  # type: ignore[method-assign]

    def optimizer_made(self, optimizer: torch.optim.Optimizer) -> None:
        """The job made an optimizer."""
        self._holders.number(optimizer)
        self._bridge.optimizer_made()
        self._holders.tell()

    def parameters_added(self, optimizer: torch.optim.Optimizer) -> None:
        """The job gave an optimizer more parameters, perhaps while it makes it."""
        if self._holders.knows(optimizer):
            self._holders.regrouped()
            self._holders.tell()

    def before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        """An optimizer is about to step; other arguments for that, if it is to have any."""
        return None if self._ignoring else self._parameter_taps.before_step(optimizer, args, kwargs)

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """It has stepped."""
        if not self._ignoring:
            self._stepped[self._holders.number(optimizer)] += 1
            self._end(optimizer)

    def steps_of(self, optimizer: torch.optim.Optimizer) -> int:
        """How often an optimizer has stepped."""
        return self._stepped[self._holders.number(optimizer)]

    def skipped_step(
        self, optimizer: torch.optim.Optimizer, held: Set[int] | None = None, scale: float | None = None
    ) -> None:
        """It was to step with the gradients that there are, and did not. `held` are ids of its parameters, where it
        does not say so itself, and `scale` is by what somebody would have divided the gradients before."""
        self._parameter_taps.before_skipped(optimizer, held, scale)
        self._end(optimizer)

    def backward_begins(self) -> Versions | None:
        """A backward pass begins: the versions of the gradients that it finds. One inside of another is part of it."""
        if torch._guards.TracingContext.try_get() is not None or torch._C._current_graph_task_id() != -1:
            return None
        return self._parameter_taps.before_backward()

    def backward_ended(self, has_left: bool, found: Versions | None) -> None:
        """A backward pass ended, and may have left gradients. One that the compiler makes to look into it is none."""
        if torch._guards.TracingContext.try_get() is None:
            if self._bridge.backward_ended() and has_left:
                self._parameter_taps.after_backward(self._ended, found)
            if self._bridge.due():
                self._turn()

    @contextlib.contextmanager
    def no_steps(self) -> Iterator[None]:
        """While in it, steps of optimizers are none of the job's."""
        self._ignoring += 1
        try:
            yield
        finally:
            self._ignoring -= 1

    def makes_states(self, owner: Any, name: str) -> None:
        """A function of this name makes the states of an optimizer, by a step with gradients that are zero."""

        def make(original: Callable[..., Any]) -> Callable[..., Any]:
            def apart(*args: Any, **kwargs: Any) -> Any:
                with self.no_steps():
                    return original(*args, **kwargs)

            return apart

        wrap(owner, name, make)

    def _end(self, optimizer: torch.optim.Optimizer) -> None:
        self._ended += 1
        self._bridge.stepped(self._holders.number(optimizer))
        self._holders.tell()
        self._after_step()
        if self._bridge.due():
            self._turn()
