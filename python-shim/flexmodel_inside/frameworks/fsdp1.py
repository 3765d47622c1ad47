"""`FullyShardedDataParallel`: parameters are runs of the flattened elements, in the shard of a flat parameter."""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence, Set
from typing import Any

from torch import nn

from .._bridge import KIND_GRAD_UNCLIPPED, KIND_PARAM
from .._bridge import PLACEMENT_PARTIAL as PARTIAL
from .._bridge import PLACEMENT_REPLICATE as REPLICATE
from .._bridge import PLACEMENT_UNKNOWN as UNKNOWN
from ..mesh import DATA, Axis
from ..naming import authored, is_instance, own
from ..parameters import Parameter, Piece, flat_placement
from ..patches import follow, given
from .adapter import Adapter, Job, ModelFacts
from .amp import follow_scale

_MODULE, _CLASS = "torch.distributed.fsdp", "FullyShardedDataParallel"
_SCALER = "torch.distributed.fsdp.sharded_grad_scaler"
_RUNTIME, _ACCUMULATE = "torch.distributed.fsdp._runtime_utils", "_accumulate_sharded_grad"


class Fsdp1(Adapter):
    """One axis, or two where shards are replicated. It has a loss scaler of its own."""

    imports = (_MODULE,)
    private_children = ("_fsdp_wrapped_module",)

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        # How often gradients of a handle's shard were added up, which torch's versions do not count; None: not known.
        self._added: weakref.WeakKeyDictionary[Any, int] | None = None

    def watches(self) -> list[tuple[Sequence[str], Callable[[], object]]]:
        return [
            ((_SCALER,), lambda: follow_scale(self.job, _SCALER, "ShardedGradScaler")),
            ((_RUNTIME,), self._follow_sums),
        ]

    def _follow_sums(self) -> None:
        runtime = sys.modules[_RUNTIME]
        if not hasattr(runtime, _ACCUMULATE):
            return
        added = self._added = weakref.WeakKeyDictionary()

        def count(_: Any, *call: Any) -> None:
            handle = given(*call, 1, "handle")
            added[handle] = added.get(handle, 0) + 1

        follow(runtime, _ACCUMULATE, self.job.guard, after=count)

    def _sums(self, where: Any) -> int | None:
        """How often gradients of the handle `where` were added up."""
        return None if self._added is None else self._added.get(where(), 0)

    def see(self, module: nn.Module, model: ModelFacts) -> None:
        if not is_instance(module, _MODULE, _CLASS):
            return
        model.wrapped("FSDP1")
        model.reduces = True
        outer, inner = self._axes(module)
        model.axes += [*outer, inner]
        handle = own(module, "_handle", None)
        if model.with_parameters and handle is not None:
            sums = functools.partial(self._sums, weakref.ref(handle))
            for place, parameter in _parameters(handle, outer, inner):
                model.shards[place] = parameter._replace(changes=sums)

    def _axes(self, module: Any) -> tuple[list[Axis], Axis]:
        """The axis between replicas of the shards, if there is one, and that of the shards."""
        meshes, between = self.job.meshes, own(module, "_inter_node_pg", None)
        outer = [] if between is None else [meshes.axis_of_group(between, "dp_replicate", DATA)]
        return outer, meshes.axis_of_group(module.process_group, "dp" if between is None else "dp_shard", DATA)


def _parameters(handle: Any, outer: list[Axis], inner: Axis) -> Iterator[tuple[tuple[int, str], Parameter]]:
    flat = handle.flat_param
    index_of = {}
    for number, (name, module, _) in enumerate(flat._param_infos):
        index_of[id(module), name] = number
        yield (id(authored(module)), name), _run(weakref.ref(handle), number, outer, inner)
    for name, module, _, first_name, first_module, _ in flat._shared_param_infos:
        number = index_of[id(first_module), first_name]
        yield (id(authored(module)), name), _run(weakref.ref(handle), number, outer, inner)


def _run(where: Any, number: int, outer: list[Axis], inner: Axis) -> Parameter:
    """The run of one parameter, by its number in the flat one of the handle `where`."""

    def is_in(held: Set[int]) -> bool:
        flat = getattr(where(), "flat_param", None)
        return flat is not None and id(flat if flat._params is None else flat._params[number]) in held

    def read(kind: int) -> Piece | None:
        handle = where()
        flat = None if handle is None else handle.flat_param
        if flat is None:
            return None
        shape, piece = tuple(flat._shapes[number]), flat._shard_param_infos[number]
        if kind == KIND_GRAD_UNCLIPPED and _is_unreduced(handle):
            start, _ = handle._get_flat_param_offsets()[_at(flat, number)]
            addend = flat.grad.detach()[start : start + flat._numels[number]].view(shape)
            # Beside what was reduced before, it is no addend of the whole.
            reduced = getattr(flat, "_saved_grad_shard", None) is not None or not handle.uses_sharded_strategy
            return addend, [axis.placed(UNKNOWN if reduced else PARTIAL) for axis in (*outer, inner)]
        shard = flat._local_shard if kind == KIND_PARAM else handle.sharded_grad
        if shard is None or (kind == KIND_GRAD_UNCLIPPED and _is_zeroed(flat)):
            return None
        start = piece.offset_in_shard if piece.in_shard else 0
        run = shard.detach().reshape(-1)[start : start + (piece.numel_in_shard if piece.in_shard else 0)]
        axes = [axis.placed(REPLICATE) for axis in outer]
        if handle.uses_sharded_strategy:
            return run, [*axes, flat_placement(inner, shape)]
        return run.view(shape), [*axes, inner.placed(REPLICATE)]

    return Parameter(read, is_in)


def _is_unreduced(handle: Any) -> bool:
    """Whether the flat parameter has this rank's own gradient, as under `no_sync`."""
    flat, state = handle.flat_param, getattr(handle, "_fully_sharded_module", None)
    if handle.uses_sharded_strategy:
        return flat.grad is not None and flat.grad.size() == flat._unpadded_unsharded_size
    return flat.grad is not None and not getattr(state, "_sync_gradients", True)


def _is_zeroed(flat: Any) -> bool:
    """Whether the job let go of the gradients of all parameters of which this rank has some. The flat one's is kept
    until the next forward pass."""
    if flat._params is None:
        return False
    pieces = zip(flat._params, flat._shard_param_infos, strict=True)
    grads = [parameter.grad for parameter, piece in pieces if piece.in_shard]
    return bool(grads) and all(grad is None for grad in grads)


def _at(flat: Any, number: int) -> int:
    """Where a parameter is among those of a flat one and what pads them."""
    padding = flat._is_padding_mask
    return [at for at, is_padding in enumerate(padding) if not is_padding][number]
