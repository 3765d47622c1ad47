"""Whole tensors of small runs: every element type, and every way in which parts lie."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import flexmodel
import numpy as np
import pytest
from flexmodel._dtypes import SIZES
from run_writer import Writer, axis, raises, shard

torch = pytest.importorskip("torch")
rng = np.random.default_rng(0)


@pytest.mark.parametrize("dtype", SIZES)
def test_every_dtype_comes_back_as_torch_has_it(run_dir: Writer, dtype: str):
    raw = rng.integers(0, 2, size=(3, 4 * SIZES[dtype]), dtype=np.uint8)
    run_dir.part("m", raw.tobytes(), dtype=dtype, shape=(3, 4))
    tensor = flexmodel.open(run_dir.root).get("m")
    assert tensor.dtype is getattr(torch, dtype)
    assert tensor.shape == (3, 4)
    assert tensor.view(torch.uint8).numpy().tobytes() == raw.tobytes()


@pytest.mark.parametrize("dtype", [d for d in SIZES if d != "complex32"])
def test_every_dtype_that_numpy_has_comes_back_as_numpy(run_dir: Writer, dtype: str):
    if dtype == "bfloat16" or dtype.startswith("float8"):
        pytest.importorskip("ml_dtypes")
    raw = rng.integers(0, 2, size=6 * SIZES[dtype], dtype=np.uint8)
    run_dir.part("m", raw.tobytes(), dtype=dtype, shape=(2, 3))
    array = flexmodel.open(run_dir.root).records[0].numpy()
    assert (array.dtype.name, array.shape, array.tobytes()) == (dtype, (2, 3), raw.tobytes())


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "complex32"])
def test_a_dtype_that_numpy_lacks_says_what_to_install(run_dir: Writer, dtype: str, monkeypatch):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    run_dir.part("m", bytes(SIZES[dtype]), dtype=dtype, shape=(1,))
    with raises("install .*torch", TypeError):
        flexmodel.open(run_dir.root).records[0].numpy()


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,)])
def test_scalars_and_empty_tensors_keep_their_shape(run_dir: Writer, shape: tuple[int, ...]):
    value = np.ones(shape, np.float32)
    run_dir.part("m", value)
    tensor = flexmodel.open(run_dir.root).get("m")
    assert tensor.shape == shape
    assert tensor.tolist() == value.tolist()


def test_a_mapped_tensor_is_the_file_and_an_edit_stays_with_the_caller(run_dir: Writer):
    value = np.arange(1 << 16, dtype=np.float32)
    run_dir.part("before", value[:100])  # so that it does not start on a page
    run_dir.part("m", value)
    run_dir.seal()
    run = flexmodel.open(run_dir.root)
    tensor = run.get("m")
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    mapped = [[int(end, 16) for end in m[0].split("-")] for m in maps if m[-1] == str(run_dir.sealed())]
    assert any(low <= tensor.data_ptr() < high for low, high in mapped), "it was copied"
    tensor.zero_()
    assert torch.equal(run.get("m"), torch.from_numpy(value))
    del tensor
    assert str(run_dir.sealed()) not in Path("/proc/self/maps").read_text(), "the mapping outlived its tensor"


def test_tensors_that_are_kept_hold_no_file_descriptors(run_dir: Writer):
    for step in range(50):
        run_dir.part("m", np.zeros(1 << 14, np.float32), step=step)
    before = len(os.listdir("/proc/self/fd"))
    kept = [record.tensor() for record in flexmodel.open(run_dir.root)["m"]]
    assert len(kept) == 50
    assert len(os.listdir("/proc/self/fd")) <= before


def test_uneven_batches_are_joined_in_rank_order_without_a_copy(run_dir: Writer):
    whole = rng.normal(size=(7, 4096)).astype(np.float32)
    for rank, rows in enumerate([whole[:3], whole[3:3], whole[3:]]):
        run_dir.part("m", rows, rank=rank, axes=[axis(rank, 3, shard(0))], align=1 if rank else 64)
    run = flexmodel.open(run_dir.root)
    record = run.records[0]
    assert (record.shape, record.ranks, record.complete, record.nbytes) == ((7, 4096), (0, 1, 2), True, whole.nbytes)
    tensor = run.get("m")
    assert torch.equal(tensor, torch.from_numpy(whole))
    assert str(run_dir.shard) in Path("/proc/self/maps").read_text()
    assert torch.equal(run.get("m", rank=2), torch.from_numpy(whole[3:]))


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("dtype", [np.int8, np.float32, np.complex128])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_pieces_in_any_order_are_joined_on_any_dimension(run_dir: Writer, dim: int, dtype: type, order: tuple):
    whole = rng.integers(-9, 9, size=(4, 5, 6)).astype(dtype)
    pieces = np.array_split(whole, 3, axis=dim)
    for index in order:
        run_dir.part("m", pieces[index], rank=9 - index, axes=[axis(index, 3, shard(dim))], align=1)
    assert torch.equal(flexmodel.open(run_dir.root).get("m"), torch.from_numpy(whole))


@pytest.mark.parametrize("inner", [0, 1])
def test_two_mesh_axes_nest_with_the_first_outermost(run_dir: Writer, inner: int):
    whole = np.arange(24, dtype=np.int32).reshape(4, 6)
    for dp, rows in enumerate(np.split(whole, 2)):
        for tp, piece in enumerate(np.split(rows, 2, axis=inner)):
            axes = [axis(dp, 2, shard(0)), axis(tp, 2, shard(inner), "tp")]
            run_dir.part("m", piece, rank=2 * dp + tp, axes=axes)
    assert torch.equal(flexmodel.open(run_dir.root).get("m"), torch.from_numpy(whole))


@pytest.mark.parametrize("dim", [0, 1])
def test_runs_of_elements_are_joined_and_take_the_shape(run_dir: Writer, dim: int):
    whole = np.arange(24, dtype=np.int16).reshape(4, 6)
    for tp, piece in enumerate(np.split(whole, 2, axis=dim)):
        shape = {"flat": {"shape": list(piece.shape)}}
        for dp, run in enumerate(np.split(piece.reshape(-1), [0, 5])):
            run_dir.part("m", run, rank=3 * tp + dp, axes=[axis(tp, 2, shard(dim), "tp"), axis(dp, 3, shape)])
    record = flexmodel.open(run_dir.root).records[0]
    assert record.shape == (4, 6)
    assert torch.equal(record.tensor(), torch.from_numpy(whole))


def test_runs_that_do_not_fill_the_shape_make_no_whole(run_dir: Writer):
    for rank in range(2):
        run_dir.part("m", np.zeros(3, np.int8), rank=rank, axes=[axis(rank, 2, {"flat": {"shape": [7]}})])
    with pytest.raises(KeyError, match="do not make"):
        flexmodel.open(run_dir.root).get("m")


def test_any_one_replica_is_enough(run_dir: Writer):
    whole = np.arange(8, dtype=np.float32).reshape(2, 4)
    # tp 0 came from one replica and tp 1 from the other.
    for dp, tp in [(0, 0), (1, 1)]:
        axes = [axis(dp, 2), axis(tp, 2, shard(1), "tp")]
        run_dir.part("m", np.split(whole, 2, axis=1)[tp], rank=2 * dp + tp, axes=axes)
    assert torch.equal(flexmodel.open(run_dir.root).get("m"), torch.from_numpy(whole))


def test_replicas_that_differ_are_not_served_as_one(run_dir: Writer):
    for rank in (0, 1):
        what = run_dir.part("m", np.full(3, rank, np.float32), rank=rank, axes=[axis(rank, 2)])
    run_dir.line({"t": "divergence", **what, "against": 0})
    run = flexmodel.open(run_dir.root)
    assert [(d.module, d.rank, d.against) for d in run.divergences] == [("m", 1, 0)]
    with raises("replicas that differ; each rank's part is kept: ask for rank= one of 0, 1"):
        run.get("m")
    assert run.get("m", rank=1).tolist() == [1, 1, 1]


@pytest.mark.parametrize("equal", [True, False])
def test_an_ambiguous_batch_of_one_is_a_replica_only_if_bytes_are_equal(run_dir: Writer, equal: bool):
    for rank in (0, 1):
        value = np.full((1, 2), 7 if equal else rank, np.float32)
        run_dir.part("m", value, rank=rank, axes=[axis(rank, 2, {"replicate_or_shard": {"dim": 0}})])
    assert flexmodel.open(run_dir.root).get("m").tolist() == ([[7, 7]] if equal else [[0, 0], [1, 1]])


def test_pieces_from_head_and_tail_come_out_in_the_order_of_the_whole(run_dir: Writer):
    parts = {"rows": [[[0, 0], [3, 3]], [[1, 1], [2, 2]]], "columns": [[[0, 3]] * 2, [[1, 2]] * 2], "odd": [[[1]]] * 2}
    for name, values in parts.items():
        for rank, value in enumerate(values):
            axes = [axis(rank, 2, {"head_tail": {"dim": int(name == "columns")}}, "cp")]
            run_dir.part(name, np.array(value, np.float32), rank=rank, axes=axes)
    run = flexmodel.open(run_dir.root)
    assert run.get("rows").tolist() == [[n, n] for n in range(4)]
    assert run.get("columns").tolist() == [[0, 1, 2, 3]] * 2
    with pytest.raises(flexmodel.NotCapturedError, match="have no halves of one length"):
        run.get("odd")


def test_ranks_that_were_given_the_same_are_no_pieces_of_a_batch(run_dir: Writer):
    for rank in range(3):
        for name, given, value in (("other", rank, rank), ("same", rank // 2, rank), ("equal", 9, 5)):
            axes = [{**axis(rank, 3, shard(0)), "input_digest": given}]
            run_dir.part(name, np.full((1,), value, np.float32), rank=rank, axes=axes)
    run = flexmodel.open(run_dir.root)
    assert run.get("other").tolist() == [0, 1, 2] and run.get("equal").tolist() == [5]
    with pytest.raises(flexmodel.NotCapturedError, match="how they lie along dp is not known"):
        run.get("same")
    assert [run[name][0].dp_size for name in ("other", "same", "equal")] == [3, 1, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
def test_partial_tensors_are_added(run_dir: Writer, dtype: torch.dtype):
    addends = (torch.randn(3, 50) * 100).to(dtype)
    for rank, addend in enumerate(addends):
        raw = addend.view(torch.uint8).numpy().tobytes()
        name = str(dtype).removeprefix("torch.")
        run_dir.part("m", raw, dtype=name, shape=(50,), rank=rank, axes=[axis(rank, 3, "partial", "tp")])
    wide = torch.float64 if dtype.is_floating_point else dtype
    expected = (addends[0].to(wide) + addends[1].to(wide) + addends[2].to(wide)).to(dtype)
    assert torch.equal(flexmodel.open(run_dir.root).get("m"), expected)


def test_a_sum_is_rounded_once(run_dir: Writer):
    for rank, addend in enumerate([1.0, 2**-8, 2**-40]):  # just over halfway between two bfloat16
        raw = torch.tensor([addend, -addend]).bfloat16().view(torch.uint8).numpy().tobytes()
        run_dir.part("m", raw, dtype="bfloat16", shape=(2,), rank=rank, axes=[axis(rank, 3, "partial", "tp")])
    assert flexmodel.open(run_dir.root).get("m").tolist() == [1 + 2**-7, -1 - 2**-7]


@pytest.mark.parametrize(
    ("places", "shapes", "reason"),
    [
        (["unknown", "unknown"], [(2,), (2,)], "how they lie along dp is not known"),
        (["replicate", shard(0)], [(2,), (2,)], "different layouts"),
        ([shard(1), shard(1)], [(2, 3), (3, 3)], "do not go together on dimension 1"),
    ],
)
def test_parts_that_make_no_whole_are_kept_apart(run_dir: Writer, places, shapes, reason):
    for rank in (0, 1):
        run_dir.part("m", np.full(shapes[rank], rank, np.int16), rank=rank, axes=[axis(rank, 2, places[rank])])
    run = flexmodel.open(run_dir.root)
    assert (run.records[0].shape, run.records[0].complete) == (None, False)
    with raises(f"{reason}.*ask for rank= one of 0, 1"):
        run.get("m")
    assert run.get("m", rank=1).shape == shapes[1]


def test_equal_parts_are_whole_also_where_each_rank_has_several(run_dir: Writer):
    for rank in (0, 1):
        for micro in (0, 1):
            axes = [axis(rank, 2, "unknown", "tp"), axis(micro, 2, shard(0), "micro")]
            for name, value in (("same", micro), ("other", rank * micro)):
                run_dir.part(name, np.full(1, value, np.int16), rank=rank, axes=axes)
    run = flexmodel.open(run_dir.root)
    assert run.get("same").tolist() == [0, 1]
    with raises("how they lie along tp is not known"):
        run.get("other")


def test_an_incomplete_record_names_the_ranks_that_are_missing(run_dir: Writer):
    for rank in range(3):
        run_dir.part("a", np.zeros(2), rank=rank, axes=[axis(rank, 3, shard(0))])
    run_dir.part("b", np.zeros(2), rank=0, axes=[axis(0, 3, shard(0))])
    run_dir.line({"t": "dropped", "rank": 2, "count": 4, "reason": "the slab was full"})
    run = flexmodel.open(run_dir.root)
    with raises(r"no part of rank 1 \(dp 1 of 3\); rank 2 \(dp 2 of 3\); parts were dropped there: the slab was full"):
        run.get("b")
    with raises("no part of rank 1, only of 0"):
        run.get("b", rank=1)
    assert [r.complete for r in run.records] == [True, False]


def test_a_part_written_twice_counts_once(run_dir: Writer):
    for rank in (0, 1, 1):
        run_dir.part("m", np.full(1, rank), rank=rank, axes=[axis(rank, 2, shard(0))])
    run = flexmodel.open(run_dir.root)
    assert run.get("m").tolist() == [0, 1]
    assert run.records[0].ranks == (0, 1)


def test_training_comes_before_evaluation(run_dir: Writer):
    for train in (False, True):
        run_dir.part("m", np.zeros(1), train=train)
    assert [record.train for record in flexmodel.open(run_dir.root)["m"]] == [True, False]


def test_statistics_of_the_whole_are_those_of_its_elements(run_dir: Writer):
    def stats(x: np.ndarray) -> dict:
        f = x[np.isfinite(x)]
        return {
            "count": x.size, "mean": f.mean(), "std": f.std(), "l2": np.linalg.norm(f), "absmax": abs(f).max(),
            "min": f.min(), "max": f.max(), "nan": int(np.isnan(x).sum()), "inf": int(np.isinf(x).sum()),
            "zero": int((x == 0).sum()),
        }  # fmt: skip

    whole = rng.normal(3, 2, size=90)
    whole[5], whole[80] = np.nan, np.inf
    for rank, piece in enumerate(np.split(whole, [20])):
        run_dir.part("m", piece, rank=rank, axes=[axis(rank, 2, shard(0))], stats=stats(piece), store=False)
    run = flexmodel.open(run_dir.root)
    record = run.records[0]
    assert (record.shape, record.complete) == ((90,), False)
    for name, value in stats(whole).items():
        assert getattr(record.stats, name) == pytest.approx(value)
    with raises("kept statistics only"):
        record.tensor()


def test_a_module_that_one_rank_alone_has_is_whole_there_once_all_ranks_have_spoken(run_dir: Writer):
    for rank, name in ((0, "experts.0"), (1, "experts.1"), (0, "both"), (1, "both")):
        run_dir.part(f"{name}.weight", np.full((2,), rank, np.float32), rank=rank, axes=[axis(rank, 2, "unknown")])
    first = {"model": 0, "ranks": [0], "modules": ["both", "experts.0"]}
    other = {"model": 0, "ranks": [1], "modules": ["both", "experts.1"]}
    run_dir.info(world=2, owners=[first])
    run = flexmodel.open(run_dir.root)
    with pytest.raises(flexmodel.NotCapturedError, match="no part of rank 1"):
        run.get("experts.0.weight")
    run_dir.info(world=2, owners=[first, other])
    run.refresh()
    assert run.get("experts.0.weight").tolist() == [0, 0] and run.get("experts.1.weight").tolist() == [1, 1]
    with pytest.raises(flexmodel.NotCapturedError, match="how they lie along dp is not known"):
        run.get("both.weight")
    # A rank may have the module in a model that has no number there.
    run_dir.info(world=2, owners=[first, other, {"model": None, "ranks": [1], "modules": ["experts.0"]}])
    run.refresh()
    with pytest.raises(flexmodel.NotCapturedError, match="no part of rank 1"):
        run.get("experts.0.weight")
