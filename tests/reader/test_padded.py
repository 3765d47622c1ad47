"""Batches that each rank padded to its own longest: rows in order, padded further or nested."""

from __future__ import annotations

import os
import subprocess
import sys

import flexmodel
import numpy as np
import pytest
from run_writer import PACKAGE, Writer, axis, raises, shard

torch = pytest.importorskip("torch")


def write(run_dir: Writer, module: str, parts: list[np.ndarray], place: object = None, **identity: object) -> None:
    place = shard(0) if place is None else place
    for rank, part in enumerate(parts):
        run_dir.part(module, part, rank=rank, axes=[axis(rank, len(parts), place)], **identity)


def pieces(*shapes: tuple[int, ...], dtype: type = np.float32) -> list[np.ndarray]:
    return [np.arange(1, np.prod(shape) + 1).reshape(shape).astype(dtype) for shape in shapes]


def test_a_whole_is_not_made_up_and_what_makes_one_is_named(run_dir: Writer):
    write(run_dir, "m", pieces((2, 3, 4), (1, 5, 4)))
    run = flexmodel.open(run_dir.root)
    (record,) = run.records
    assert (record.shape, record.padded_shape, record.complete) == (None, (3, 5, 4), False)
    assert "rows of several sizes, padded [3, 5, 4]" in repr(record)
    with raises(r"its own longest \(\[3, 3..5, 4\]\): `pad=0`.*`nested=True`.*rank= one of 0, 1"):
        run.get("m")
    assert run.get("m", rank=1).shape == (1, 5, 4)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(
    ("dtype", "pad"),
    [(np.float32, 0), (np.float32, float("-inf")), (np.int64, -100), (np.bool_, True), (np.float16, np.float32(0.5))],
)
def test_rows_are_in_order_and_filled_up(run_dir: Writer, side: str, dtype: type, pad: object):
    parts = pieces((2, 3, 4), (3, 5, 4), (1, 1, 4), dtype=dtype)
    write(run_dir, "m", parts)
    expected = torch.full((6, 5, 4), pad, dtype=torch.from_numpy(parts[0]).dtype)
    for row, own in enumerate(row for part in parts for row in torch.from_numpy(part)):
        expected[row, slice(0, len(own)) if side == "right" else slice(5 - len(own), 5)] = own
    run = flexmodel.open(run_dir.root)
    whole = run.get("m", pad=pad, side=side)
    assert whole.dtype == expected.dtype and torch.equal(whole, expected)
    assert np.array_equal(run.records[0].numpy(pad=pad, side=side), expected.numpy())


@pytest.mark.parametrize("large", [False, True])
def test_several_dimensions_are_filled_up_at_once(run_dir: Writer, large: bool):
    """As attention's weights have them; of large ones memory is mapped."""
    n = 100 if large else 1
    parts = pieces((1, 2, 3 * n, 3 * n), (2, 2, 2 * n, 2 * n))
    write(run_dir, "m", parts)
    expected = torch.full((3, 2, 3 * n, 3 * n), 9.0)
    expected[:1], expected[1:, :, n:, n:] = torch.from_numpy(parts[0]), torch.from_numpy(parts[1])
    assert torch.equal(flexmodel.open(run_dir.root).get("m", pad=9, side="left"), expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e5m2", "complex64"])
def test_elements_of_every_kind_can_be_filled_up_and_nested(run_dir: Writer, dtype: str):
    kind = getattr(torch, dtype)
    parts = [torch.full(shape, value).to(kind) for value, shape in ((1.0, (2, 1)), (2.0, (1, 3)))]
    for rank, part in enumerate(parts):
        raw, axes = part.view(torch.uint8).numpy().tobytes(), [axis(rank, 2, shard(0))]
        run_dir.part("m", raw, dtype=dtype, shape=tuple(part.shape), rank=rank, axes=axes)
    run = flexmodel.open(run_dir.root)
    found = run.get("m", pad=-0.5)
    assert found.dtype is kind
    assert found.to(torch.complex64).tolist() == [[1, -0.5, -0.5], [1, -0.5, -0.5], [2, 2, 2]]
    rows = run.get("m", nested=True).unbind()
    assert [row.to(torch.complex64).tolist() for row in rows] == [[1], [1], [2, 2, 2]]


@pytest.mark.parametrize(
    ("shapes", "layout"),
    [
        ([(2, 3, 4), (1, 5, 4)], torch.jagged),
        ([(2, 4, 3), (3, 4, 5)], torch.jagged),  # the last dimension
        ([(2, 3), (1, 5)], torch.jagged),
        ([(2, 3, 4), (1, 3, 4)], torch.jagged),  # which happens to be of one length
        ([(2, 2, 3, 3), (1, 2, 5, 5)], torch.strided),
    ],
)
def test_a_nested_tensor_has_every_row_as_it_is(run_dir: Writer, shapes: list[tuple[int, ...]], layout: torch.layout):
    parts = pieces(*shapes)
    write(run_dir, "m", parts)
    found = flexmodel.open(run_dir.root).get("m", nested=True)
    assert found.is_nested and found.layout is layout
    rows = [torch.from_numpy(row) for part in parts for row in part]
    assert len(found.unbind()) == len(rows)
    assert all(map(torch.equal, found.unbind(), rows))


def test_one_sequence_a_rank_is_a_row_whatever_else_it_might_be(run_dir: Writer):
    either = {"replicate_or_shard": {"dim": 0}}
    for name, rows in (("all", 1), ("one", 2)):
        for rank, part in enumerate(pieces((1, 3), (rows, 5))):
            axes = [axis(rank, 2, either if len(part) == 1 else shard(0))]
            run_dir.part(name, part, rank=rank, axes=axes)
    run = flexmodel.open(run_dir.root)
    assert run.get("all", pad=0).tolist() == [[1, 2, 3, 0, 0], [1, 2, 3, 4, 5]]
    assert run.get("one", pad=0, side="left")[0].tolist() == [0, 0, 1, 2, 3]
    assert run["one"][0].padded_shape == (3, 5)


def test_where_rows_are_of_one_size_there_is_nothing_to_fill_up(run_dir: Writer):
    write(run_dir, "m", pieces((2, 3), (1, 3)))
    write(run_dir, "weight", pieces((2, 3), (2, 3)), "replicate")
    run = flexmodel.open(run_dir.root)
    for name in ("m", "weight"):
        assert torch.equal(run.get(name, pad=7, side="left"), run.get(name))
        assert run[name][0].padded_shape is None
    assert len(run.get("weight", nested=True).unbind()) == 2


def test_every_other_disagreement_stays_what_it_is(run_dir: Writer):
    write(run_dir, "columns", pieces((2, 3), (1, 3)), shard(1))
    write(run_dir, "addends", pieces((2, 3), (2, 4)), "partial")
    write(run_dir, "unknown", pieces((2, 3), (2, 4)), "unknown")
    write(run_dir, "replicas", pieces((2, 3), (2, 4)))
    write(run_dir, "dimensions", pieces((2, 3), (2, 4, 1)))
    run_dir.part("missing", *pieces((2, 3)), axes=[axis(0, 3, shard(0))])
    run_dir.part("missing", *pieces((2, 4)), rank=1, axes=[axis(1, 3, shard(0))])
    run = flexmodel.open(run_dir.root)
    for name, reason in {
        "columns": "do not go together on dimension 1", "addends": "differ in shape", "unknown": "is not known",
        "dimensions": "do not go together on dimension 0", "missing": "no part of dp 2 of 3",
    }.items():  # fmt: skip
        for how in ({}, {"pad": 0}, {"nested": True}):
            with raises(reason):
                run.get(name, **how)


def test_pieces_inside_of_the_rows_are_put_together_first(run_dir: Writer):
    """Tensor parallelism under data parallelism."""
    rows = pieces((2, 3, 4), (1, 5, 4))
    for dp, part in enumerate(rows):
        for tp, piece in enumerate(np.split(part, 2, axis=2)):
            axes = [axis(dp, 2, shard(0)), axis(tp, 2, shard(2), "tp")]
            run_dir.part("m", piece, rank=2 * dp + tp, axes=axes)
    run = flexmodel.open(run_dir.root)
    assert all(map(torch.equal, run.get("m", nested=True).unbind(), [torch.from_numpy(r) for p in rows for r in p]))
    assert torch.equal(run.get("m", pad=0)[:2, :3], torch.from_numpy(rows[0]))


def test_the_microbatches_of_one_rank_are_rows_too(run_dir: Writer):
    for micro, part in enumerate(pieces((2, 3), (1, 5))):
        run_dir.part("m", part, axes=[axis(0, 1, shard(0)), axis(micro, 2, shard(0), "micro")])
    run = flexmodel.open(run_dir.root)
    assert run.get("m", rank=0, pad=0).shape == (3, 5)
    assert len(run.records[0].part(0, nested=True).unbind()) == 3


def test_statistics_are_those_of_the_rows(run_dir: Writer):
    for rank, part in enumerate(pieces((2, 3), (1, 5))):
        stats = {
            "count": part.size, "mean": float(part.mean()), "std": float(part.std()),
            "l2": float(np.linalg.norm(part)), "absmax": float(part.max()), "min": float(part.min()),
            "max": float(part.max()), "nan": 0, "inf": 0, "zero": 0,
        }  # fmt: skip
        run_dir.part("m", part, rank=rank, axes=[axis(rank, 2, shard(0))], stats=stats)
    stats = flexmodel.open(run_dir.root).records[0].stats
    assert stats.count == 11 and stats.mean == pytest.approx(36 / 11) and stats.min == 1


@pytest.mark.parametrize(
    ("how", "error", "reason"),
    [
        ({"pad": 300}, ValueError, "pad: 300 is no uint8"),
        ({"pad": 0.5}, ValueError, "pad: 0.5 is no uint8"),
        ({"pad": "0"}, TypeError, "pad is a number, not str"),
        ({"pad": 0, "side": "both"}, ValueError, "side is 'right' or 'left', not 'both'"),
        ({"pad": 0, "nested": True}, ValueError, "one of both"),
    ],
)
def test_what_cannot_be_done_is_said(run_dir: Writer, how: dict, error: type[Exception], reason: str):
    write(run_dir, "m", pieces((2, 3), (1, 5), dtype=np.uint8))
    with raises(reason, error):
        flexmodel.open(run_dir.root).get("m", **how)


def test_numbers_are_no_rows(run_dir: Writer):
    write(run_dir, "m", pieces((2,), (1,)))
    with raises(r"this is a tensor of shape \[2\]", ValueError):
        flexmodel.open(run_dir.root).get("m", nested=True)


def test_a_tensor_of_one_element_is_a_number(run_dir: Writer):
    write(run_dir, "m", pieces((1, 1), (1, 2), dtype=np.int64))
    run = flexmodel.open(run_dir.root)
    for pad in (torch.tensor(-100), np.int64(-100), np.float32(-100)):
        assert run.get("m", pad=pad).tolist() == [[1, -100], [1, 2]]


def test_without_torch_rows_are_padded_and_not_nested(run_dir: Writer):
    write(run_dir, "m", pieces((2, 3), (1, 5)))
    code = f"""
import sys
sys.modules["torch"] = None
import flexmodel
run = flexmodel.open({str(run_dir.root)!r})
print(type(run.get("m", pad=0)).__module__, run.get("m", pad=0).shape)
try:
    run.get("m", nested=True)
except TypeError as error:
    print(error)
"""
    env = {**os.environ, "PYTHONPATH": str(PACKAGE)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=env)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == "numpy (3, 5)" and "nested tensor of torch's, which is not installed" in second
