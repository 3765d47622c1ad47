"""The axes of a model's mesh, as rank 5 of 8 sees them (torch's fake process group: one process, no communication)."""

import dataclasses
import sys
import types
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from flexmodel_inside import patches
from flexmodel_inside._bridge import PLACEMENT_SHARD as SHARD
from flexmodel_inside._bridge import PLACEMENT_UNKNOWN as UNKNOWN
from flexmodel_inside.faults import Faults
from flexmodel_inside.frameworks import Frameworks, Job
from flexmodel_inside.frameworks.context_parallel import Cut
from flexmodel_inside.layouts import Layouts
from flexmodel_inside.mesh import ASSUMED, CONTEXT, DATA, OTHER, TENSOR, Axis, Meshes
from flexmodel_inside.naming import all_in
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.experimental import _context_parallel  # noqa: F401
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

RANK, WORLD = 5, 8


@pytest.fixture(autouse=True)
def eight_ranks():
    dist.init_process_group("fake", store=FakeStore(), rank=RANK, world_size=WORLD)
    yield
    dist.destroy_process_group()
    for patch in reversed(patches.made()):
        patch.restore()


class Rank:
    """What FlexModel knows in this process: no mesh yet. Whatever raises fails the test."""

    def __init__(self) -> None:
        self.meshes = Meshes()
        bridge = types.SimpleNamespace(faults_with=lambda *_: None, notice=pytest.fail, wants=lambda _: False)
        names = [field.name for field in dataclasses.fields(Job)][4:]  # the callbacks
        told = dict.fromkeys(names, lambda *_: None) | {"clock": mock.Mock(**{"before_step.return_value": None})}
        self.frameworks = Frameworks(Job(bridge, Faults(bridge), self.meshes, Layouts(), **told))

        def if_imported(names, then) -> None:
            if all(name in sys.modules for name in names):
                then()

        self.frameworks.watch(if_imported, lambda function: function)

    def axes(self, model: nn.Module) -> list[Axis]:
        return self.meshes.of_model(self.frameworks.look_at(all_in(model), False).axes, RANK, WORLD)


def axes(model: nn.Module, *noted: DeviceMesh) -> list[tuple[str, int, int, int]]:
    rank = Rank()
    for mesh in noted:
        rank.meshes.axes_of(mesh)
    return [axis[:4] for axis in rank.axes(model)]


def test_a_model_that_nothing_describes_is_only_assumed_to_share_the_batch():
    assert axes(nn.Linear(8, 8)) == [("dp", 5, 8, ASSUMED)]


def test_a_model_that_only_a_mesh_of_the_jobs_own_describes_lies_along_that():
    rank = Rank()

    def now() -> list[tuple[str, int, int, int]]:
        return [axis[:4] for axis in rank.axes(nn.Linear(8, 8))]

    kept = [init_device_mesh("cpu", (4, 2), mesh_dim_names=("dp", "tp"))]
    assert now() == [("dp", 2, 4, DATA), ("tp", 1, 2, TENSOR)]
    kept.append(init_device_mesh("cpu", (2, 4), mesh_dim_names=("dp", "tp")))
    assert now() == [("dp", 5, 8, ASSUMED)], "one of two may be meant"


def test_a_wrapper_over_all_ranks_has_the_batch_whatever_the_name():
    for names in (None, ("dp",), ("gpus",), ("model",)):
        mesh = init_device_mesh("cpu", (8,), mesh_dim_names=names)
        assert [axis[1:] for axis in axes(fully_shard(nn.Linear(8, 8), mesh=mesh), mesh)] == [(5, 8, DATA)]


def test_the_batch_is_on_replicas_and_shards():
    mesh = init_device_mesh("cpu", (2, 4), mesh_dim_names=("outer", "inner"))
    assert axes(fully_shard(nn.Linear(8, 8), mesh=mesh), mesh) == [("outer", 1, 2, DATA), ("inner", 1, 4, DATA)]


def test_ranks_that_the_tensor_axis_does_not_reach_are_named_by_the_mesh_or_are_not_known():
    named = init_device_mesh("cpu", (4, 2), mesh_dim_names=("dp", "tp"))
    model = parallelize_module(nn.Linear(8, 8), named["tp"], ColwiseParallel())
    assert axes(model) == [("tp", 1, 2, TENSOR), ("dp", 2, 4, DATA)]
    alone = DeviceMesh("cpu", [[0, 1], [2, 3], [4, 5], [6, 7]])
    model = parallelize_module(nn.Linear(8, 8), _inner(alone), ColwiseParallel())
    assert axes(model) == [("tp", 1, 2, TENSOR), ("rest", 2, 4, OTHER)]


def _inner(mesh: DeviceMesh) -> DeviceMesh:
    """The last axis of a mesh without names, as a mesh."""
    row = next(row for row in mesh.mesh.tolist() if RANK in row)
    return DeviceMesh("cpu", torch.tensor(row))


def test_an_axis_over_which_torch_cuts_sequences_carries_no_batch_whatever_its_name():
    unnamed = init_device_mesh("cpu", (8,))
    rank = Rank()
    before = fully_shard(nn.Linear(8, 8), mesh=unnamed)
    assert [axis.role for axis in rank.axes(before)] == [DATA]
    axis, is_new = rank.meshes.cut_along(unnamed)
    assert (axis.index, axis.size, axis.role, is_new) == (5, 8, CONTEXT, True)
    assert rank.meshes.cut_along(unnamed)[1] is False
    for model in (before, nn.Linear(8, 8)):
        assert [axis.role for axis in rank.axes(model)] == [CONTEXT]
    named = init_device_mesh("cpu", (4, 2), mesh_dim_names=("dp", "cp"))
    rank = Rank()
    rank.meshes.cut_along(named["cp"])
    found = [axis[:4] for axis in rank.axes(nn.Linear(8, 8))]
    assert sorted(found) == [("cp", 1, 2, CONTEXT), ("dp", 2, 4, DATA)]


@pytest.mark.parametrize(
    ("shape", "dims", "found"),
    [
        ((4, 6, 32), {1}, 1),
        ((4, 6), {1, 0}, 1),
        ((6, 32), {1, 0}, 0),
        ((6, 32), {1}, None),  # nothing that is cut has no batch
        ((5, 6, 32), {1}, None),  # another batch
        ((4, 12, 32), {1}, None),  # the whole sequence
        ((4, 6, 6, 8), {1}, None),  # as many heads as places
        ((24, 32), {1}, None),
        ((6, 6), {1, 0}, None),
        ((), {1}, None),
    ],
)
def test_a_piece_of_sequences_is_told_by_its_shape_where_only_one_dimension_may_be_cut(shape, dims, found):
    cut = Cut(Axis("cp", 1, 2, CONTEXT, (0, 1)), SHARD, 6, frozenset({4}), frozenset(dims))
    assert cut.of(torch.Size(shape)) == (None if found is None else ("cp", 1, 2, SHARD, found))


def test_an_axis_that_others_are_folded_into_gives_way_to_them():
    mesh = init_device_mesh("cpu", (4, 2), mesh_dim_names=("dp", "cp"))
    folded = mesh["dp", "cp"]._flatten("dp_cp")
    model = fully_shard(nn.Linear(8, 8), mesh=folded)
    assert axes(model, mesh) == [("dp", 2, 4, DATA), ("cp", 1, 2, CONTEXT)]


def cut(weight: nn.Parameter, mesh: DeviceMesh) -> nn.Parameter:
    """A piece of its rows. What torch would make of the whole may be on a mesh of an earlier test, which is equal."""
    piece = weight.detach().chunk(mesh.size())[mesh.get_local_rank()]
    return nn.Parameter(DTensor.from_local(piece, mesh, [Shard(0)], run_check=False))


def with_experts(**sizes: int) -> nn.Module:
    """As transformers distributes a model: dense layers over one mesh, experts over another one of the same ranks. No
    other test has meshes of these names: torch remembers one, and takes it for every equal one."""
    fsdp, tp, efsdp, ep = sizes.values()
    dense = init_device_mesh("cpu", (fsdp, tp), mesh_dim_names=("fsdp", "tensor"))
    expert = init_device_mesh("cpu", (efsdp, ep), mesh_dim_names=("efsdp", "ep"))
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8, bias=False))
    if tp > 1:
        parallelize_module(model[0], dense["tensor"], ColwiseParallel())
    model[1].weight = cut(model[1].weight, expert["ep"])
    fully_shard(model[1], mesh=expert["efsdp"])
    return fully_shard(model, mesh=dense["fsdp"])


def test_experts_are_among_the_ranks_of_the_batch_in_the_order_of_its_rows():
    of_batch = [("efsdp", 2, 4, DATA), ("ep", 1, 2, DATA)]
    assert axes(with_experts(fsdp=8, tp=1, efsdp=4, ep=2)) == of_batch
    # Both axes are coordinate 2 of 4 along `fsdp`: 1 of 2 shards of experts, and 0 of 2 that have these.
    rank = Rank()
    found = rank.axes(with_experts(fsdp=4, tp=2, efsdp=2, ep=4))
    assert [axis[:4] for axis in found if axis.role == DATA] == [("efsdp", 1, 2, DATA), ("rest", 0, 2, DATA)]
    assert [axis[:4] for axis in found if axis.role != DATA] == [("tensor", 1, 2, TENSOR)]
    assert {axis.name: axis.ranks for axis in found} == {"efsdp": (1, 5), "rest": (5, 7), "tensor": (4, 5)}


def test_ranks_that_no_axis_reaches_are_not_of_the_batch_where_there_are_no_experts():
    """Tensor parallelism by hand, and a layer that all ranks hold: its wrapper's batch is not that of the model."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    fully_shard(model[1], mesh=init_device_mesh("cpu", (8,), mesh_dim_names=("all",)))
    fully_shard(model, mesh=DeviceMesh("cpu", [1, 3, 5, 7], mesh_dim_names=("dp",)))
    assert axes(model) == [("dp", 2, 4, DATA), ("rest", 1, 2, OTHER)]


def test_experts_on_an_axis_of_their_own_say_nothing_of_the_batch():
    mesh = init_device_mesh("cpu", (4, 2), mesh_dim_names=("dp", "experts"))
    model = nn.Linear(8, 8, bias=False)
    model.weight = cut(model.weight, mesh["experts"])
    assert axes(model) == [("experts", 1, 2, OTHER), ("dp", 2, 4, DATA)]


@pytest.mark.parametrize(
    ("placements", "known"),
    [
        ([_StridedShard(0, split_factor=2), Shard(0)], True),  # FSDP over what tensor parallelism has cut
        ([Replicate(), _StridedShard(0, split_factor=2)], False),  # two weights in one, each in pieces
        ([_StridedShard(0, split_factor=4), Shard(0)], False),
        ([Shard(1), _StridedShard(0, split_factor=2)], False),
    ],
)
def test_interleaved_pieces_are_known_where_the_mesh_accounts_for_them(placements, known):
    mesh = init_device_mesh("cpu", (4, 2), mesh_dim_names=("dp", "tp"))
    tensor = DTensor.from_local(torch.zeros(4, 4), mesh, placements, run_check=False)
    _, found = Rank().frameworks.decided("placement", tensor)
    assert sorted(name for name, *_ in found) == ["dp", "tp"]
    assert all(place != UNKNOWN for _, _, _, place, _ in found) == known


def test_a_mesh_for_planning_is_nobodys():
    mesh = DeviceMesh("cpu", list(range(8)), mesh_dim_names=("dp",), _init_backend=False)
    assert Meshes().axes_of(mesh) == []
