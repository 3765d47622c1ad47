"""Parameters and their gradients, as the pieces that this process holds.

Nothing is gathered and no collective runs, so it does not matter which ranks look. Modules are never asked for a
parameter by name: under DeepSpeed ZeRO-3 that may start a collective of the job's. Under every wrapper the pieces lie
somewhere else:

| wrapper | a parameter | its gradient |
|---|---|---|
| none, DDP | whole, in the module | `.grad` |
| tensor parallel | a DTensor in the module | `.grad`, a DTensor with a layout of its own |
| FSDP2 | `FSDPParam.sharded_param`, a DTensor | its `.grad` |
| FSDP1 | a run of the elements, in the shard of the flat parameter | a run, in that of its gradient |
| DeepSpeed ZeRO-1, 2 | whole, in the module | a run, in the flat partition that the inner optimizer has |
| DeepSpeed ZeRO-3 | a run, in `ds_tensor` | as above |
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Set
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ._bridge import KIND_GRAD as GRAD
from ._bridge import KIND_PARAM as PARAM
from ._bridge import PLACEMENT_FLAT as FLAT
from .faults import Faults
from .layouts import MODULE, REPLICATE, SHARD, UNKNOWN, Layouts
from .mesh import DATA, TENSOR, Axis, Meshes
from .naming import all_in, authored, own, stored
from .wrappers import fsdp2_groups, is_instance, wrapper_name

# A tensor and how it lies along each axis.
Piece = tuple[torch.Tensor, list[Any]]


class Parameter(NamedTuple):
    """One parameter under one name."""

    # What this process holds now of the parameter, or of the gradient that the optimizer is about to use.
    read: Callable[[int], Piece | None]
    # Whether an optimizer has it that holds tensors with these ids.
    is_in: Callable[[Set[int]], bool]


class Parameters:
    """The parameters of one model."""

    def __init__(
        self,
        top: nn.Module,
        named: list[tuple[str, nn.Module]],
        meshes: Meshes,
        layouts: Layouts,
        mesh: list[Axis],
        faults: Faults,
    ) -> None:
        self._meshes = meshes
        self._layouts = layouts
        self._mesh = mesh
        wrapper = wrapper_name(top)
        self._replicated = wrapper == "DDP" or wrapper.startswith("DeepSpeed")
        engines = (m for m in all_in(top) if is_instance(m, "deepspeed.runtime.engine", "DeepSpeedEngine"))
        self._engine = next(map(weakref.ref, engines), None)
        elsewhere: dict[tuple[int, str], Parameter] = {}
        for module in all_in(top):
            what = f"parameters of a {type(module).__name__}"
            elsewhere.update(faults.of(what, self._sharded_by, module, otherwise={}))
        self.by_name: dict[str, Parameter] = {}
        for name, module in named:
            plain = {key: self._plain(module, key) for key, p in stored(module).items() if key != "_flat_param"}
            for key, parameter in (plain | {k: p for (m, k), p in elsewhere.items() if m == id(module)}).items():
                self.by_name[f"{name}.{key}" if name else key] = parameter

    def _sharded_by(self, module: nn.Module) -> dict[tuple[int, str], Parameter]:
        """Those that a wrapper keeps somewhere else, by the module and the name that they have there."""
        found: dict[tuple[int, str], Parameter] = {}
        for group in fsdp2_groups(module):
            found.update(self._of_fsdp2(group))
        handle = own(module, "_handle", None)
        if handle is not None and is_instance(module, "torch.distributed.fsdp", "FullyShardedDataParallel"):
            found.update(self._of_fsdp1(module, handle))
        return found

    def _rest(self, told: list[Any], place: int) -> list[Any]:
        """Axes of the mesh that are not told of, outermost: `place` on those of the batch."""
        names = {axis[0] for axis in told}
        rest = [axis for axis in self._mesh if axis.name not in names]
        return [(a.name, a.index, a.size, place if a.role == DATA else UNKNOWN, 0) for a in rest] + told

    def _plain(self, module: nn.Module, key: str) -> Parameter:
        where = weakref.ref(module)

        def parameter_now() -> Any:
            module = where()
            return None if module is None else stored(module).get(key)

        def read(kind: int) -> Piece | None:
            parameter = parameter_now()
            # One of a lazy module's has no elements before that is called first.
            if parameter is None or is_lazy(parameter):
                return None
            if hasattr(parameter, "ds_tensor"):
                return self._zero_3(parameter, kind)
            if kind == GRAD and self._engine is not None:
                return self._zero_gradient(parameter)
            value = parameter if kind == PARAM else parameter.grad
            return None if value is None else self._described(value, parameter)

        def is_in(held: Set[int]) -> bool:
            parameter = parameter_now()
            flats = self._partitions(parameter)
            return id(parameter) in held if flats is None else any(id(flat) in held for flat in flats)

        return Parameter(read, is_in)

    def _described(self, value: torch.Tensor, parameter: torch.Tensor) -> Piece:
        if is_instance(value, MODULE, "DTensor"):
            local, told = self._layouts.describe(value) or (value, [])
        else:
            local, told = value, []
            if getattr(parameter, "tensor_model_parallel", False):  # megatron's mark
                # DeepSpeed has the mark too, and says nothing of the dimension.
                dim = getattr(parameter, "partition_dim", None)
                place = (SHARD, dim) if isinstance(dim, int) and 0 <= dim < value.dim() else (UNKNOWN, 0)
                told = [(a.name, a.index, a.size, *place) for a in self._mesh if a.role == TENSOR]
        return local.detach(), self._rest(told, REPLICATE if self._replicated else UNKNOWN)

    def _of_fsdp2(self, group: Any) -> Iterator[tuple[tuple[int, str], Parameter]]:
        for fsdp_param in group.fsdp_params:
            info = fsdp_param._module_info
            where = weakref.ref(fsdp_param)

            def sharded(where: Any = where) -> Any:
                fsdp_param = where()
                return None if fsdp_param is None else fsdp_param.sharded_param

            def read(kind: int, sharded: Any = sharded) -> Piece | None:
                value = sharded()
                value = value.grad if kind == GRAD and value is not None else value
                if value is None:
                    return None
                local, told = self._layouts.describe(value) or (value, [])
                return local.detach(), told

            places = [(info.module, info.param_name), *zip(info.shared_modules, info.shared_param_names, strict=True)]
            for module, name in places:
                yield (id(authored(module)), name), Parameter(read, lambda held, sharded=sharded: id(sharded()) in held)

    def _of_fsdp1(self, wrapper: Any, handle: Any) -> Iterator[tuple[tuple[int, str], Parameter]]:
        between = own(wrapper, "_inter_node_pg", None)
        outer = [] if between is None else [self._meshes.axis_of_group(between, "dp_replicate", DATA)]
        inner = self._meshes.axis_of_group(wrapper.process_group, "dp", DATA)
        flat = handle.flat_param
        index_of = {}
        for number, (name, module, _) in enumerate(flat._param_infos):
            index_of[id(module), name] = number
            yield (id(authored(module)), name), self._run(weakref.ref(handle), number, outer, inner)
        for name, module, _, first_name, first_module, _ in flat._shared_param_infos:
            number = index_of[id(first_module), first_name]
            yield (id(authored(module)), name), self._run(weakref.ref(handle), number, outer, inner)

    def _run(self, where: Any, number: int, outer: list[Axis], inner: Axis) -> Parameter:
        def is_in(held: Set[int]) -> bool:
            flat = getattr(where(), "flat_param", None)
            return flat is not None and id(flat if flat._params is None else flat._params[number]) in held

        def read(kind: int) -> Piece | None:
            handle = where()
            flat = None if handle is None else handle.flat_param
            if flat is None:
                return None
            shape, piece = tuple(flat._shapes[number]), flat._shard_param_infos[number]
            shard = flat._local_shard if kind == PARAM else handle.sharded_grad
            if shard is None:
                return None
            start = piece.offset_in_shard if piece.in_shard else 0
            run = shard.detach().reshape(-1)[start : start + (piece.numel_in_shard if piece.in_shard else 0)]
            axes = [(a.name, a.index, a.size, REPLICATE, 0) for a in outer]
            if handle.uses_sharded_strategy:
                return run, [*axes, _flat(inner, shape)]
            return run.view(shape), [*axes, (inner.name, inner.index, inner.size, REPLICATE, 0)]

        return Parameter(read, is_in)

    def _zero_3(self, parameter: Any, kind: int) -> Piece | None:
        axis = self._meshes.axis_of_group(parameter.ds_process_group, "dp", DATA)
        own_part, shape = parameter.ds_tensor, tuple(parameter.ds_shape)
        # The last partitions are padded.
        length = max(0, min(own_part.ds_numel, parameter.ds_numel - axis.index * own_part.ds_numel))
        if kind == PARAM:
            return own_part.detach().reshape(-1)[:length], [_flat(axis, shape)]
        flats = self._partitions(parameter)
        if not flats:
            return None
        optimizer = self._engine().optimizer  # type: ignore[misc, union-attr]
        _, start, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
        gradient = flats[0].grad
        return None if gradient is None else (gradient.detach()[start : start + length], [_flat(axis, shape)])

    def _partitions(self, parameter: Any) -> list[torch.Tensor] | None:
        """The flat partitions in DeepSpeed's inner optimizer that have some of a parameter on this rank, or all of them
        where other ranks have the parameter; None where that optimizer has parameters themselves."""
        optimizer = getattr(self._engine() if self._engine else None, "optimizer", None)
        for name in ("single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
            flats = getattr(optimizer, name, None)
            if flats is not None:
                mapping = getattr(parameter, "_hp_mapping", None)
                return list(flats) if mapping is None else [flats[mapping.param_group_index]]
        flats = getattr(optimizer, "fp32_partitioned_groups_flat", None)
        if flats is None:
            return None
        position = optimizer.grad_position.get(optimizer.get_param_id(parameter))  # type: ignore[union-attr]
        return [] if position is None else [flats[position[0]]]

    def _zero_gradient(self, parameter: Any) -> Piece | None:
        engine = self._engine() if self._engine else None
        flats = self._partitions(parameter)
        if engine is None or flats is None:
            return None if parameter.grad is None else self._described(parameter.grad, parameter)
        gradient = next((flat.grad for flat in flats if flat.grad is not None), None)
        if gradient is None or not parameter.requires_grad:
            return None
        group = getattr(parameter, "_dp_group", None) or engine.data_parallel_group
        axis = _flat(self._meshes.axis_of_group(group, "dp", DATA), tuple(parameter.shape))
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is None:
            return gradient.detach()[:0], [axis]
        address = mapping.hp_fragment_address
        return gradient.detach()[address.start : address.start + address.numel], [axis]


def _flat(axis: Axis, shape: tuple[int, ...]) -> tuple[Any, ...]:
    return (axis.name, axis.index, axis.size, FLAT, 0, shape)
