"""Which optimizers hold the parameters of which taps: where several step in turn, `every=` counts a tap's own."""

from __future__ import annotations

import dataclasses
import itertools
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .naming import all_in, stored


@dataclasses.dataclass
class _Tap:
    number: int
    # Ids of the parameters of its module; of the model's where that has none, as an activation has not.
    parameters: frozenset[int]
    # The numbers of optimizers that the engine knows of it.
    told: list[int] = dataclasses.field(default_factory=list)


class Holders:
    """The optimizers of this process, by number, and the parameters behind taps."""

    def __init__(self, bridge: Any) -> None:
        self._bridge = bridge
        # By id: an optimizer need not be hashable.
        self._optimizers: dict[int, tuple[weakref.ref[torch.optim.Optimizer], int]] = {}
        self._next = itertools.count()
        # By the model's serial.
        self._taps: dict[int, list[_Tap]] = {}
        # Some optimizer has come or gone.
        self._changed = False

    def number(self, optimizer: torch.optim.Optimizer) -> int:
        """The number of an optimizer, for as long as it lives."""
        key = id(optimizer)
        if key not in self._optimizers:
            self._optimizers[key] = weakref.ref(optimizer, lambda _: self._gone(key)), next(self._next)
            self._changed = True
        return self._optimizers[key][1]

    def knows(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether an optimizer has a number."""
        return id(optimizer) in self._optimizers

    def regrouped(self) -> None:
        """An optimizer was given more parameters."""
        self._changed = True

    def put(self, serial: int, model: nn.Module, taps: Iterable[tuple[int, nn.Module]]) -> None:
        """A model's taps from now on."""
        of_model = _parameters(model)
        self._taps[serial] = [_Tap(number, _parameters(module) or of_model) for number, module in taps]
        self._changed = True

    def drop(self, serial: int) -> None:
        """A model has none any more."""
        self._taps.pop(serial, None)

    def tell(self) -> None:
        """Tells the engine what has changed."""
        if not self._changed:
            return
        self._changed = False
        optimizers = list(self._optimizers.values())
        # By the id of a parameter. One optimizer alone steps in every step.
        holding: dict[int, set[int]] = {}
        for reference, number in optimizers if len(optimizers) > 1 else ():
            optimizer = reference()
            for group in () if optimizer is None else optimizer.param_groups:
                for parameter in group["params"]:
                    holding.setdefault(id(parameter), set()).add(number)
        # Taps without parameters of their own share their model's.
        known: dict[int, list[int]] = {}
        for tap in itertools.chain.from_iterable(self._taps.values()):
            numbers = known.get(id(tap.parameters))
            if numbers is None:
                of_tap = (holding[key] for key in tap.parameters if key in holding)
                numbers = known[id(tap.parameters)] = sorted(set().union(*of_tap))
            if numbers != tap.told:
                self._bridge.optimizers_of(tap.number, numbers)
                tap.told = numbers

    def _gone(self, key: int) -> None:
        self._optimizers.pop(key, None)
        self._changed = True


def _parameters(module: nn.Module) -> frozenset[int]:
    return frozenset(id(parameter) for each in all_in(module) for parameter in stored(each).values())
