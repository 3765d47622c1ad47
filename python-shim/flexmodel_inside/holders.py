"""Which optimizers hold the parameters of which taps: where several step in turn, `every=` counts a tap's own."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .naming import all_in, stored


class Holders:
    """The optimizers of this process, by number, and the parameters behind taps."""

    def __init__(self, bridge: Any) -> None:
        self._bridge = bridge
        self._numbers: weakref.WeakKeyDictionary[torch.optim.Optimizer, int] = weakref.WeakKeyDictionary()
        self._next = itertools.count()
        # By the model's serial: taps with modules, and the model.
        self._taps: dict[int, list[tuple[int, weakref.ref[nn.Module], weakref.ref[nn.Module]]]] = {}

    def number(self, optimizer: torch.optim.Optimizer) -> int:
        """The number of an optimizer, for as long as it lives."""
        number = self._numbers.get(optimizer)
        if number is None:
            number = self._numbers[optimizer] = next(self._next)
        return number

    def made(self, optimizer: torch.optim.Optimizer) -> None:
        """The job made an optimizer, or gave it more parameters."""
        self.number(optimizer)
        self._bridge.optimizer_made()
        for serial in self._taps:
            self._tell(serial)

    def put(self, serial: int, model: nn.Module, taps: Iterable[tuple[int, nn.Module]]) -> None:
        """A model's taps from now on."""
        root = weakref.ref(model)
        self._taps[serial] = [(tap, weakref.ref(module), root) for tap, module in taps]
        self._tell(serial)

    def drop(self, serial: int) -> None:
        """A model has none any more."""
        self._taps.pop(serial, None)

    def _tell(self, serial: int) -> None:
        # One alone steps in every step.
        if len(self._numbers) < 2:
            return
        by_parameter: dict[int, set[int]] = {}
        for optimizer, number in self._numbers.items():
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    by_parameter.setdefault(id(parameter), set()).add(number)
        for tap, *references in self._taps[serial]:
            # One without parameters of its own, such as an activation, is with the model.
            for module in (reference() for reference in references):
                held = set() if module is None else _of(module, by_parameter)
                if held:
                    self._bridge.held_by(tap, sorted(held))
                    break


def _of(module: nn.Module, by_parameter: dict[int, set[int]]) -> set[int]:
    found = (by_parameter.get(id(p), ()) for each in all_in(module) for p in stored(each).values())
    return set().union(*found)
