"""What an adapter of a framework may answer, and what it is given.

An adapter is a class in a file of its own, and a line in `frameworks/__init__.py`. It imports nothing that the job has
not imported: it says which modules it waits for, and finds them in `sys.modules`. It runs no collective, and reads no
parameter through an attribute of a module (`stored` is for that): under DeepSpeed ZeRO-3 that may start one.

Every answer is optional. What raises costs what was asked about (a value, say, whose placement nobody knows then), and
is reported by name.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from .._bridge import KINDS_SCALED

if TYPE_CHECKING:
    from ..caches import Caches
    from ..clock import Clock
    from ..faults import Faults
    from ..layouts import AxisPlacement, Layouts
    from ..mesh import Axis, Meshes
    from ..parameters import Parameter, ParameterTaps, Piece


@dataclasses.dataclass
class Job:
    """What adapters may use of the rest, and whom they tell what happened."""

    bridge: Any
    faults: Faults
    meshes: Meshes
    layouts: Layouts
    parameter_taps: ParameterTaps
    # Models have to be looked at again.
    changed: Callable[[], None]
    # This process has joined a process group.
    joined: Callable[[], None]
    # A module puts children into itself without torch's registration: know it from now on.
    meet: Callable[[nn.Module], None]
    # While in it, modules that this thread makes are a library's own.
    ignoring: Callable[[], contextlib.AbstractContextManager[None]]
    # Models that are called from now on are not the job's own work, or are again.
    pause: Callable[[bool], None]
    # Models that were not looked at are looked at now.
    settle: Callable[[], None]
    # The name under which a module is tapped; None if it is not.
    tapped_as: Callable[[nn.Module], str | None]
    # A stage of a pipeline knows its microbatches.
    prepared: Callable[[Stage], None]
    # A pipeline begins a batch, with all stages of this process.
    begin_batch: Callable[[], None]
    # What ends a step.
    clock: Clock
    # torch.compile is in use; from then on there is what keeps our graphs out of caches.
    compiler_is_here: Callable[[], None]
    caches: Callable[[], Caches | None]

    @property
    def guard(self) -> Callable[..., Any]:
        """Makes of a function one that raises nothing."""
        return self.faults.guard

    def wants_gradients(self) -> bool:
        """Whether gradients that the scale of a loss is in are to be captured at the moment."""
        return bool(self.bridge.wants(KINDS_SCALED))

    def scale(self, value: torch.Tensor | float, divisor: float = 1.0) -> Any:
        """A scale as it is now, divided: for the functions below. No device is waited for before a gradient needs it.
        None where it cannot be known, as inside of a CUDA graph."""
        return self.bridge.scale(value, divisor)

    def loss_scale(self, scale: Any) -> None:
        """From now on gradients are those of the job's loss times a scale."""
        if scale is not None:
            self.bridge.loss_scale(scale)

    def unscaled(self) -> None:
        """From now on gradients are those of the job's loss."""
        self.loss_scale(self.scale(1.0))

    def scaled(self, losses: Any, scale: Any) -> None:
        """Gradients of backward passes through these losses are those of the job's own times a scale."""
        if scale is None:
            return
        for loss in losses if isinstance(losses, (list, tuple)) else (losses,):
            if isinstance(loss, torch.Tensor):
                self.bridge.scaled(loss, scale)
            elif isinstance(loss, (list, tuple)):
                self.scaled(loss, scale)


class Stage(Protocol):
    """A stage of a pipeline."""

    # What it runs, which may be wrapped; None once that is destroyed.
    submod: nn.Module | None
    # The process group of the stages; None for all ranks.
    group: Any
    # Microbatches of a step, once known. An attribute `microbatch` is their batch and length, negative if they vary.
    chunks: int | None


class ModelFacts:
    """What adapters have found out about one model while they were shown its modules."""

    def __init__(self, with_parameters: bool) -> None:
        # Whether parameters or their gradients are to be captured at all.
        self.with_parameters = with_parameters
        # No adapter raised. Where one did, there may be axes over which the model lies that are missing here.
        self.is_known = True
        # How the job wraps the model; '' if it does not.
        self.wrapper = ""
        # Whether the ranks of the batch have whole parameters, where nothing else is known.
        self.replicated = False
        # Whether its gradients are reduced in the backward pass because of what it is, whoever calls it.
        self.reduces = False
        # The axes over which it lies, outermost first, and the device meshes that they are of.
        self.axes: list[Axis] = []
        self.meshes: list[Any] = []
        # Parameters that a wrapper keeps outside of the module, by the module's id and their name in it.
        self.shards: dict[tuple[int, str], Parameter] = {}
        # A code of `orders`, if all modules have the same.
        self.order: int | None = None
        # What an adapter keeps for itself.
        self.notes: dict[type, Any] = {}
        # The mesh in the end, outermost axis first.
        self.mesh: list[Axis] = []

    def wrapped(self, name: str, replicated: bool = False) -> None:
        """The first wrapper that says so gives its name."""
        if not self.wrapper:
            self.wrapper, self.replicated = name, replicated


class Adapter:
    """One framework. What it knows by itself is in the attributes, and holds before it is present."""

    # The modules that it waits for; it is present once they are imported.
    imports: Sequence[str] = ()
    # Classes, as (module, name), whose child `module` is what they wrap.
    wrappers: Sequence[tuple[str, str]] = ()
    # Names of children that only its wrappers have, for what they wrap.
    private_children: Sequence[str] = ()
    # What it puts before the name of a class when it swaps in a subclass.
    subclass_prefixes: Sequence[str] = ()
    # Classes, as (module, name), whose `layer_number`, from 1, counts the layers of the whole model.
    numbered: Sequence[tuple[str, str]] = ()

    def __init__(self, job: Job) -> None:
        self.job = job

    def watches(self) -> list[tuple[Sequence[str], Callable[[], object]]]:
        """What it follows: the modules that have to be imported, and the function to call then, once."""
        return []

    def begin(self, model: ModelFacts) -> None:
        """A model is about to be walked through."""

    def see(self, module: nn.Module, model: ModelFacts) -> None:
        """A module of the model, which may be a wrapper."""

    def conclude(self, model: ModelFacts) -> None:
        """All modules were shown."""

    def placement(self, tensor: torch.Tensor) -> tuple[torch.Tensor, list[AxisPlacement]] | None:
        """The part of a tensor that this process holds and how it lies; None where the framework cannot tell, and
        `NotImplemented` where the tensor's class is none of the framework's."""
        return NotImplemented

    def placement_by_module(
        self, tensor: torch.Tensor, module: nn.Module, is_input: bool
    ) -> list[AxisPlacement] | None:
        """How a tensor lies that a module is given, or gives."""
        return None

    def placement_by_shape(self, shape: torch.Size) -> AxisPlacement | None:
        """How any tensor of this shape lies along one axis."""
        return None

    def parameter_placement(self, parameter: torch.Tensor, model: ModelFacts) -> list[AxisPlacement] | None:
        """How a parameter that is no tensor of the framework's own class lies, and its gradient too."""
        return None

    def read(self, parameter: torch.Tensor, kind: int, model: ModelFacts) -> Piece | None:
        """What this process holds of a parameter that is in its module, or of its gradient; None if nothing now, and
        `NotImplemented` where that is what the parameter itself says. May raise `ElsewhereError`."""
        return NotImplemented

    def gradient_in_copy(self, parameter: torch.Tensor, model: ModelFacts) -> torch.Tensor | None:
        """The gradient that an optimizer is about to use which has a copy of a parameter, of another type. It has the
        shape of the parameter, and lies as that does."""
        return None

    def went_backward(self, ended: int) -> None:
        """A backward pass has left gradients; `ended` counts the steps that optimizers have ended so far."""

    def along_batch(self, model: ModelFacts, kind: int) -> int | None:
        """The placement, along the axes of the batch, of a parameter in its module, or of its gradient; None if what is
        known of the model says it. Of replicas one rank sends the bytes: all have to make this now."""

    def held_as(self, parameter: torch.Tensor, model: ModelFacts) -> list[torch.Tensor] | None:
        """The tensors that an optimizer has in a parameter's place."""
        return None

    def is_reducing(self) -> bool | None:
        """Whether the forward under way is a wrapper's that reduces gradients in the backward pass; None if not."""
        return None

    def stages(self) -> list[Stage]:
        """The stages of pipelines that this process has."""
        return []
