"""Damaged and dishonest runs: each piece of damage costs itself, in one clear line."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import flexmodel
import numpy as np
import pytest
from run_writer import PACKAGE, Writer, axis, raises, shard


def test_a_flipped_byte_in_the_manifest_costs_one_line(run_dir: Writer):
    for step in range(3):
        run_dir.part("m", np.array([step]), step=step)
    manifest = run_dir.root / "manifest.jsonl"
    lines = manifest.read_bytes().splitlines(keepends=True)
    lines[1] = lines[1].replace(b'"step":1', b'"step":7')
    manifest.write_bytes(b"".join(lines))
    run = flexmodel.open(run_dir.root)
    assert [r.step for r in run.records] == [0, 2]
    assert run.problems == [f"{manifest}: line 2 is skipped: its checksum is wrong"]


def test_garbage_in_the_manifest_costs_only_itself(run_dir: Writer):
    run_dir.part("mé" * 3000, np.array([0]))
    with (run_dir.root / "manifest.jsonl").open("ab") as file:
        file.write(b"\n{}\n\x00\xff\n" + b"x" * 5000 + b"\n")
    run_dir.line({"t": "part", "module": "m"})
    run_dir.line({"t": "omen"})
    run_dir.part("m", bytes(1), dtype="int4", shape=(1,))
    run_dir.line([1])
    run_dir.part("n", np.array([1]))
    run = flexmodel.open(run_dir.root)
    assert run.get("n").tolist() == [1] and run.get("mé" * 3000).tolist() == [0]
    assert len(run.problems) == 8


@pytest.mark.parametrize(
    ("written", "scale"),
    [
        (0.5, 0.5),
        (65536, 65536.0),
        (0.0, 0.0),
        ("inf", math.inf),
        ("-inf", -math.inf),
        ("nan", math.nan),
        pytest.param(None, math.nan, id="older versions' null"),
    ],
)
def test_a_loss_scale_is_what_the_job_used(run_dir: Writer, written: object, scale: float):
    run_dir.part("fc", np.ones(2, np.float32), kind="backward", loss_scale=written)
    run = flexmodel.open(run_dir.root)
    assert not run.problems
    (record,) = run.records
    assert type(record.loss_scale) is float
    np.testing.assert_equal(record.loss_scale, scale)


@pytest.mark.parametrize("written", ["Infinity", "2", True, []])
def test_a_loss_scale_that_is_no_number_costs_its_line(run_dir: Writer, written: object):
    run_dir.part("fc", np.ones(2, np.float32), kind="backward", loss_scale=written)
    run_dir.part("other", np.ones(2, np.float32))
    run = flexmodel.open(run_dir.root)
    assert [record.module for record in run.records] == ["other"]
    assert len(run.problems) == 1 and "loss scale" in run.problems[0]


def test_a_torn_last_line_of_a_finished_run_is_a_problem(run_dir: Writer):
    run_dir.part("m", np.array([1]))
    run_dir.info(finished_ns=1)
    with (run_dir.root / "manifest.jsonl").open("ab") as file:
        file.write(b'{"crc":"00')
    run = flexmodel.open(run_dir.root)
    assert run.get("m").tolist() == [1]
    assert len(run.problems) == 1 and "half a line" in run.problems[0]


@pytest.mark.parametrize("size", [1 << 16, 4])
def test_a_shard_cut_short_still_serves_what_it_has(run_dir: Writer, size: int):
    run_dir.part("a", np.zeros(size, np.uint8))
    run_dir.part("b", np.zeros(size, np.uint8))
    run_dir.seal()
    os.truncate(run_dir.sealed(), run_dir.sealed().stat().st_size - 1)
    run = flexmodel.open(run_dir.root)
    assert len(run.problems) == 1 and "shard-00000 is cut short" in run.problems[0]
    assert run.get("a").shape == (size,)
    with raises("^b forward out step 0.*cut short", flexmodel.RunError):
        run.get("b")


def test_a_missing_shard_is_named(run_dir: Writer):
    run_dir.part("m", np.zeros(3))
    run_dir.shard.unlink()
    run = flexmodel.open(run_dir.root)
    assert len(run.problems) == 1 and "shard-00000.safetensors is missing" in run.problems[0]
    assert run.records[0].shape == (3,)
    with raises("is missing", flexmodel.RunError):
        run.get("m")


def test_a_shard_outside_the_run_is_never_opened(run_dir: Writer):
    run_dir.stem = "../run/shard-00000"
    run_dir.part("m", np.zeros(3))
    with raises("no name of a shard", flexmodel.RunError):
        flexmodel.open(run_dir.root).get("m")


def test_a_manifest_that_contradicts_itself_is_refused(run_dir: Writer):
    run_dir.part("m", np.zeros(3), shape=(4,))
    with raises("24 bytes are not a float64 of shape", flexmodel.RunError):
        flexmodel.open(run_dir.root).get("m")


@pytest.mark.parametrize("types", [(np.float64, np.float32), (np.float32, np.float64)])
def test_a_rank_gives_its_part_in_the_type_that_it_has(run_dir: Writer, types: tuple):
    for rank, dtype in enumerate(types):
        run_dir.part("m", np.arange(40_000, dtype=dtype) + rank, rank=rank, axes=[axis(rank, 2, shard(0))])
    run = flexmodel.open(run_dir.root)
    with raises("rank 0 has"):
        run.get("m")
    for rank, dtype in enumerate(types):
        part = run.get("m", rank=rank).numpy()
        assert part.dtype == dtype and np.array_equal(part, np.arange(40_000, dtype=dtype) + rank)


SHORT_OF_MEMORY = """
import resource, sys
import flexmodel
run = flexmodel.open(sys.argv[1])
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (48 << 20),) * 2)
try:
    run["m"][0].numpy()
except flexmodel.RunError as error:
    print(error)
"""


@pytest.mark.parametrize("how", ["partial", "head_tail"])
def test_where_memory_is_short_it_is_an_error(run_dir: Writer, how: str):
    """Both need memory of their own, which is asked for and not taken for granted."""
    place = {"head_tail": {"dim": 0}} if how == "head_tail" else "partial"
    for rank in range(2):
        run_dir.part("m", np.zeros(16 << 20, np.uint8), rank=rank, axes=[axis(rank, 2, place)])
    argv = [sys.executable, "-c", SHORT_OF_MEMORY, str(run_dir.root)]
    env = {**os.environ, "PYTHONPATH": str(PACKAGE)}
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, env=env)
    assert done.returncode == 0, done
    assert "memory" in done.stdout, done


def test_a_hostile_mesh_is_named_in_bounded_words(run_dir: Writer):
    run_dir.part("m", np.zeros(3), axes=[axis(0, 4_000_000_000, shard(0))])
    with raises("dp 16 of 4000000000") as error:
        flexmodel.open(run_dir.root).get("m")
    assert len(str(error.value)) < 1000


def test_records_are_served_without_run_json(run_dir: Writer):
    run_dir.part("m", np.array([1]))
    (run_dir.root / "run.json").write_text('{"format":')
    run = flexmodel.open(run_dir.root)
    assert run.get("m").tolist() == [1]
    assert len(run.problems) == 1 and "run.json cannot be read" in run.problems[0]


def test_what_is_no_run_says_what_to_open(run_dir: Writer, tmp_path: Path):
    with raises("no run at .*--out", FileNotFoundError) as error:
        flexmodel.open(tmp_path / "nothing")
    assert isinstance(error.value, flexmodel.RunError)
    (tmp_path / "empty").mkdir()
    with raises("is empty: pass the directory", ValueError):
        flexmodel.open(tmp_path / "empty")
    with raises("is not a run but holds one: open run in it", flexmodel.RunError):
        flexmodel.open(tmp_path)
    with raises(f"is a file: open its directory, {run_dir.root}", flexmodel.RunError):
        flexmodel.open(run_dir.root / "run.json")
    with raises("neither run.json nor manifest.jsonl", flexmodel.RunError):
        flexmodel.open(PACKAGE)
    run_dir.info(format=99)
    with raises("format 99.*newer", flexmodel.RunError):
        flexmodel.open(run_dir.root)
    (run_dir.root / "run.json").write_bytes(b"")
    with raises("no readable record", flexmodel.RunError):
        flexmodel.open(run_dir.root)
