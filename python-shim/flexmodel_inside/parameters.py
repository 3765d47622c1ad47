"""Parameters and their gradients, as the pieces that this process holds.

Nothing is gathered and no collective runs, so it does not matter which ranks look. Modules are never asked for a
parameter by name: under DeepSpeed ZeRO-3 that may start a collective of the job's. Without a wrapper, and under DDP, a
parameter is whole in its module, and so is its gradient; a tensor parallel one is a DTensor there. What FSDP and ZeRO
keep elsewhere, their adapters in `frameworks` read.
"""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable, Set
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from . import steps
from ._bridge import (
    KIND_GRAD,
    KIND_GRAD_UNCLIPPED,
    KIND_PARAM,
    KINDS_OF_ACCUMULATED_GRADIENTS,
    KINDS_OF_PARAMETERS,
    REFUSAL_ELSEWHERE,
    REFUSAL_PACKED,
    REFUSAL_RAISED,
)
from ._bridge import PLACEMENT_FLAT as FLAT
from ._bridge import PLACEMENT_REPLICATE as REPLICATE
from ._bridge import PLACEMENT_UNKNOWN as UNKNOWN
from .faults import Faults
from .layouts import Layouts
from .mesh import DATA, Axis
from .naming import stored
from .packed import is_packed

if TYPE_CHECKING:
    from .frameworks import Frameworks, ModelFacts

# A tensor and how it lies along each axis: an `AxisPlacement`, or a `flat_placement`.
Piece = tuple[torch.Tensor, list[Any]]


# What tells the value of a gradient from others, by the number of the tap; 0 where there is none, or nothing does.
Versions = dict[int, int]


class ElsewhereError(Exception):
    """A gradient is in buffers of a framework's own until the optimizer steps."""


class Parameter(NamedTuple):
    """One parameter under one name."""

    # What this process holds now of the parameter, of the gradient that the optimizer is about to use, or of what
    # backward passes have left so far. May raise `ElsewhereError`.
    read: Callable[[int], Piece | None]
    # Whether an optimizer has it that holds tensors with these ids.
    is_in: Callable[[Set[int]], bool]
    # Whether the elements that were read are codes of values.
    is_packed: Callable[[torch.Tensor], bool] = lambda local: False
    # How often its gradient changed beside the changes that torch counts; None: nobody knows.
    changes: Callable[[], int | None] = lambda: 0


def flat_placement(axis: Axis, shape: tuple[int, ...]) -> tuple[Any, ...]:
    """A run of the flattened elements of what has this shape."""
    return (*axis.placed(FLAT), shape)


def detached(local: torch.Tensor) -> torch.Tensor:
    """The same without autograd. What answers for all operations itself is not asked: it may give its packed inside."""
    is_plain = type(local).__torch_dispatch__ is torch.Tensor.__torch_dispatch__
    return local.detach() if is_plain else local


def _packed(where: weakref.ref[nn.Module], key: str) -> Callable[[torch.Tensor], bool]:
    def packed(local: torch.Tensor) -> bool:
        module = where()
        return module is not None and is_packed(module, key, local)

    return packed


class Parameters:
    """Reads those that are in their modules, as their layout and the frameworks say."""

    def __init__(self, layouts: Layouts, frameworks: Frameworks) -> None:
        self._layouts = layouts
        self._frameworks = frameworks

    def of_model(self, named: list[tuple[str, nn.Module]], model: ModelFacts) -> dict[str, Parameter]:
        """All of a model's, by name."""
        elsewhere: dict[int, dict[str, Parameter]] = {}
        for (module_id, key), parameter in model.shards.items():
            elsewhere.setdefault(module_id, {})[key] = parameter
        by_name: dict[str, Parameter] = {}
        for name, module in named:
            plain = {key: self._plain(module, key, model) for key in stored(module) if key != "_flat_param"}
            for key, parameter in (plain | elsewhere.get(id(module), {})).items():
                checked = parameter._replace(is_packed=_packed(weakref.ref(module), key))
                by_name[f"{name}.{key}" if name else key] = checked
        return by_name

    def _plain(self, module: nn.Module, key: str, model: ModelFacts) -> Parameter:
        where, frameworks = weakref.ref(module), self._frameworks

        def parameter_now() -> Any:
            module = where()
            return None if module is None else stored(module).get(key)

        def read(kind: int) -> Piece | None:
            parameter = parameter_now()
            # One of a lazy module's has no elements before that is called first.
            if parameter is None or is_lazy(parameter):
                return None
            piece = frameworks.decided("read", parameter, kind, model)
            if piece is not NotImplemented:
                return piece
            in_copy = frameworks.first("gradient_in_copy", parameter, model) if kind == KIND_GRAD else None
            value = parameter if kind == KIND_PARAM else parameter.grad if in_copy is None else in_copy
            return None if value is None else self._described(value, parameter, kind, model)

        def is_in(held: Set[int]) -> bool:
            parameter = parameter_now()
            if parameter is None:
                return False
            others = frameworks.first("held_as", parameter, model)
            return any(id(each) in held for each in ([parameter] if others is None else others))

        return Parameter(read, is_in)

    def _described(self, value: torch.Tensor, parameter: torch.Tensor, kind: int, model: ModelFacts) -> Piece:
        if self._frameworks.decided("placement", value) is not NotImplemented:
            local, axes = self._layouts.describe(value) or (value, [])
        else:
            local, axes = value, self._frameworks.first("parameter_placement", parameter, model) or []
        # Axes of which nothing is known are outermost.
        known = {axis[0] for axis in axes}
        of_batch = self._frameworks.first("along_batch", model, kind)
        if of_batch is None:
            of_batch = REPLICATE if model.replicated else UNKNOWN
        rest = [axis for axis in model.mesh if axis.name not in known]
        return detached(local), [*(axis.placed(of_batch if axis.role == DATA else UNKNOWN) for axis in rest), *axes]


@dataclasses.dataclass
class _Use:
    """What an optimizer makes of gradients, or would make of those that there are."""

    # Ids of its parameters; None: of all.
    held: Set[int] | None = None
    # It divides gradients by this, which may have to be waited for.
    scale: torch.Tensor | float | Callable[[], float] | None = None
    # It does not use them.
    is_skipped: Callable[[], bool] = lambda: False

    def unscaled(self, gradient: torch.Tensor) -> torch.Tensor:
        """As the optimizer would use it."""
        if isinstance(self.scale, torch.Tensor):
            return gradient / self.scale.to(gradient.device)
        scale = self.scale() if callable(self.scale) else self.scale
        return gradient if scale is None or scale == 1 else gradient / scale


class ParameterTaps:
    """Captures parameters at the first forward of a step, and gradients after each backward pass and just before the
    optimizer's."""

    def __init__(self, bridge: Any, faults: Faults) -> None:
        self._bridge = bridge
        self._faults = faults
        # Who is asked, set by themselves.
        self.frameworks: Frameworks
        # With its name, by the model's serial, and the tap's number.
        self._taps: dict[int, dict[int, tuple[str, Parameter]]] = {}

    def are_wanted(self) -> bool:
        """Whether any hook is for parameters or their gradients."""
        return bool(self._bridge.wants(KINDS_OF_PARAMETERS))

    def put(self, serial: int, taps: dict[int, tuple[str, Parameter]]) -> None:
        """A model's taps from now on."""
        self._taps[serial] = taps

    def drop(self, serial: int) -> None:
        """A model has none any more."""
        self._taps.pop(serial, None)

    def capture(self, serial: int, kind: int, use: _Use | None = None, before: Versions | None = None) -> None:
        """Captures what is due of a model's parameters; if given, of those alone that an optimizer uses, and whose
        gradients have not the versions that they had before."""
        with torch._C.DisableTorchFunction():  # what the job's classes of tensors do is no matter here
            for tap, (name, parameter) in self._taps.get(serial, {}).items():
                known = None if before is None else before.get(tap)
                due = self._bridge.parameter_due(tap, kind)
                if due and not self._faults.of(name, self._capture_one, tap, kind, parameter, use or _Use(), known):
                    self._bridge.refuse_parameter(tap, kind, REFUSAL_RAISED)

    def _capture_one(self, tap: int, kind: int, parameter: Parameter, use: _Use, known: int | None) -> bool:
        try:
            piece = parameter.read(kind) if use.held is None or parameter.is_in(use.held) else None
        except ElsewhereError:
            self._bridge.refuse_parameter(tap, kind, REFUSAL_ELSEWHERE)
            return True
        if piece is not None:
            local, axes = piece
            if kind == KIND_PARAM and parameter.is_packed(local):
                self._bridge.refuse_parameter(tap, kind, REFUSAL_PACKED)
                return True
            version = _version(parameter, local) if kind == KIND_GRAD_UNCLIPPED else 0
            if version and version == known:
                return True
            if kind != KIND_PARAM:
                local = use.unscaled(local)
            self._bridge.capture_parameter(tap, kind, local, axes, kind == KIND_GRAD and use.is_skipped(), version)
        return True

    def before_backward(self) -> Versions | None:
        """The versions of the gradients that a backward pass finds: it may leave some as they are, whatever the job did
        to them since the one that they are of."""
        if not self._bridge.wants(KINDS_OF_ACCUMULATED_GRADIENTS):
            return None
        with torch._C.DisableTorchFunction():
            taps = [tap for taps in self._taps.values() for tap in taps.items()]
            taps = [tap for tap in taps if self._bridge.parameter_due(tap[0], KIND_GRAD_UNCLIPPED)]
            return {tap: self._faults.of(name, _found, parameter, otherwise=0) for tap, (name, parameter) in taps}

    def after_backward(self, ended: int, before: Versions | None) -> None:
        """A backward pass has left gradients, where it found some of these versions; `ended` counts the steps that have
        ended."""
        if self._bridge.wants(KINDS_OF_ACCUMULATED_GRADIENTS):
            self.frameworks.tell("went_backward", ended)
            for serial in self._taps:
                self.capture(serial, KIND_GRAD_UNCLIPPED, _Use(scale=self._bridge.backward_scale), before)

    def before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        """An optimizer is about to use gradients: those that are there or, if it is given a closure, those that this
        computes, when it is called first. Parameters still are what the forward used, which torch.compile may have run
        without us where it knows no effects."""
        if not self.are_wanted() or steps.has_stand_in(args, kwargs):
            return None
        # The model may be called in the closure for the first time.
        capture = functools.partial(self._faults.of, "the gradients of an optimizer", self._capture_of, optimizer)
        given = steps.with_stand_in(type(optimizer).step, args, kwargs, capture)
        if given is None:
            capture()
        return given

    def before_skipped(
        self, optimizer: torch.optim.Optimizer, held: Set[int] | None = None, scale: float | None = None
    ) -> None:
        """An optimizer was not given the gradients that there are. `held` and `scale` are as for a skipped step."""
        use = _Use(_held(optimizer) if held is None else held, scale, lambda: True)
        self._faults.of("the gradients of a skipped optimizer", self._capture_for, use)

    def _capture_of(self, optimizer: torch.optim.Optimizer) -> None:
        if not any(self._taps.values()):
            return
        # What a GradScaler leaves to an optimizer that unscales gradients while it uses them, or does not use them.
        scale, found_inf = (getattr(optimizer, name, None) for name in ("grad_scale", "found_inf"))
        use = _Use(_held(optimizer), scale if isinstance(scale, torch.Tensor) else None)
        if isinstance(found_inf, torch.Tensor):
            use.is_skipped = functools.cache(lambda: bool(found_inf.item()))  # which may be on a device
        self._capture_for(use)

    def _capture_for(self, use: _Use) -> None:
        # An optimizer that steps in the backward pass leaves nothing for its end.
        in_backward = torch._C._current_graph_task_id() != -1
        for serial in self._taps:
            if in_backward:
                self.capture(serial, KIND_GRAD_UNCLIPPED, use)
            self.capture(serial, KIND_PARAM, use)
            self.capture(serial, KIND_GRAD, use)


def _held(optimizer: torch.optim.Optimizer) -> Set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def _found(parameter: Parameter) -> int:
    """The version of the gradient that there is, 0 for none."""
    try:
        piece = parameter.read(KIND_GRAD_UNCLIPPED)
    except ElsewhereError:
        return 0
    return 0 if piece is None else _version(parameter, piece[0])


def _version(parameter: Parameter, value: torch.Tensor) -> int:
    """Tells a gradient's value from those that it had before, and from other tensors'; 0 where nothing does."""
    changes = parameter.changes()
    if changes is None:
        return 0
    return hash((value.data_ptr(), value._version, tuple(value.shape), changes)) & (2**64 - 1) or 1
