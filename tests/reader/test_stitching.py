"""Runs of several nodes in one folder are read as the run of their job."""

from __future__ import annotations

import json
from pathlib import Path

import flexmodel
import numpy as np
import pytest
from run_writer import Writer, axis, shard

INFO = {"world": 4, "hooks": "mlp", "torch": "2.11.0", "python": "3.11.2", "started_ns": 5}


def _node(job: Path, name: str, ranks: list[int], **info: object) -> Writer:
    """A node's run: two rows of `mlp` from each rank of four, and a table that all of them have."""
    job.mkdir(exist_ok=True)
    writer = Writer(job / name, **{**INFO, "node": name, **info})
    for rank in ranks:
        writer.part("mlp", np.full((2, 3), rank, np.float32), rank=rank, axes=[axis(rank, 4, shard(0))])
        writer.part("table", np.arange(3.0), rank=rank, axes=[axis(rank, 4)])
    return writer


def _job(tmp_path: Path) -> tuple[Path, Writer, Writer]:
    job = tmp_path / "job"
    return job, _node(job, "node-a", [0, 1]), _node(job, "node-b", [2, 3])


def test_parts_of_two_nodes_make_one_tensor(tmp_path: Path):
    job, a, _ = _job(tmp_path)
    a.seal()
    run = flexmodel.open(job)
    assert run.nodes == ["node-a", "node-b"] and run.modules == ["mlp", "table"]
    whole = run.get("mlp").numpy()
    assert np.array_equal(whole, np.repeat(np.arange(4, dtype=np.float32), 2)[:, None] * np.ones(3, np.float32))
    assert run["mlp"][0].ranks == (0, 1, 2, 3) and run["table"][0].shape == (3,)
    assert not run.problems and not run.divergences
    assert np.array_equal(run.get("mlp", rank=3).numpy(), np.full((2, 3), 3, np.float32))


def test_a_sealed_shard_of_a_node_that_was_cut_is_a_problem(tmp_path: Path):
    job, a, _ = _job(tmp_path)
    a.seal()
    whole = a.sealed().stat().st_size
    with a.sealed().open("ab") as file:
        file.truncate(whole + 8)
    a.line({"t": "sealed", "shard": "shard-00000", "len": whole + 9})
    (problem,) = flexmodel.open(job).problems
    assert "node-a/shard-00000 is cut short" in problem


def test_what_the_nodes_say_is_told_of_the_job(tmp_path: Path):
    job, a, b = _job(tmp_path)
    modules = [{"name": name, "class": "M", "kinds": 1} for name in ("one", "two", "three")]
    told = {"totals": {"dropped": 2}, "finished_ns": 9, "exit_code": 0}
    a.info(**INFO, node="a", models=[{"model": 0, "modules": modules[:2]}], notices=["x", "y"], **told)
    b.info(**INFO, node="b", models=[{"model": 0, "modules": modules[1:]}], notices=["y"], **{**told, "exit_code": 3})
    info = flexmodel.open(job).info
    assert (info.world, info.node, info.exit_code, info.finished_ns, info.totals.dropped) == (4, "a, b", 3, 9, 4)
    assert info.notices == ("x", "y")
    assert [m.name for m in info.models[0].modules] == ["one", "two", "three"]
    b.info(**INFO)
    assert flexmodel.open(job).info.finished_ns is None, "one node is not finished"


@pytest.mark.parametrize(
    ("codes", "job"), [((0, 0), 0), ((0, None), None), ((None, 0), None), ((None, 3), 3), ((0, 3), 3), ((4, 3), 4)]
)
def test_a_job_went_well_if_all_nodes_are_known_to_have(tmp_path: Path, codes: tuple, job: int | None):
    folder, *nodes = _job(tmp_path)
    for node, code in zip(nodes, codes, strict=True):
        node.info(**INFO, exit_code=code)
    assert flexmodel.open(folder).info.exit_code == job


def test_a_record_that_lies_on_two_nodes_is_counted_once(tmp_path: Path):
    folder, *nodes = _job(tmp_path)
    for node in nodes:
        node.info(**INFO, totals={"records": 2, "parts": 4})
    totals = flexmodel.open(folder).info.totals
    assert (totals.records, totals.parts) == (2, 8)


def test_a_running_job_of_two_nodes_is_read_as_it_writes(tmp_path: Path):
    job, a, b = _job(tmp_path)
    run = flexmodel.open(job)
    b.part("mlp", np.zeros((2, 3), np.float32), rank=3, axes=[axis(3, 4, shard(0))], step=1)
    assert run.refresh() == 1
    assert not run["mlp"][1].complete
    for writer, rank in ((b, 2), (a, 1), (a, 0)):
        writer.part("mlp", np.ones((2, 3), np.float32), rank=rank, axes=[axis(rank, 4, shard(0))], step=1)
    assert run.refresh() == 3
    assert run.get("mlp", step=1).shape == (8, 3)


def test_replicas_of_two_nodes_that_differ_are_a_divergence(tmp_path: Path):
    job, a, b = _job(tmp_path)
    b.part("table", np.zeros(3), rank=2, axes=[axis(2, 4)], step=1)
    a.part("table", np.ones(3), rank=0, axes=[axis(0, 4)], step=1)
    (found,) = flexmodel.open(job).divergences
    assert (found.module, found.step, found.rank, found.against) == ("table", 1, 2, 0)


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"world": 8}, "node-a has a world of 4 and node-b 8"),
        ({"hooks": "attn"}, "node-a has the hooks mlp and node-b attn"),
        ({"torch": "2.15.0"}, "node-a has torch 2.11.0 and node-b 2.15.0"),
    ],
)
def test_runs_that_do_not_belong_together_are_refused_in_one_line(tmp_path: Path, changed: dict, why: str):
    job, _, b = _job(tmp_path)
    b.info(**{**INFO, **changed})
    with pytest.raises(flexmodel.RunError, match=f"not the nodes of one job: {why}; open one of them") as error:
        flexmodel.open(job)
    assert "\n" not in str(error.value)


def test_two_runs_of_one_rank_are_not_one_job(tmp_path: Path):
    job = tmp_path / "job"
    _node(job, "first", [0, 1])
    _node(job, "second", [1, 2])
    with pytest.raises(flexmodel.RunError, match="first and second both have rank 1"):
        flexmodel.open(job)
    alone = tmp_path / "alone"
    _node(alone, "first", [0], world=1)
    _node(alone, "second", [0], world=1)
    with pytest.raises(flexmodel.RunError, match="first is a run of one process"):
        flexmodel.open(alone)


def test_a_node_that_no_rank_attached_to_yet_is_no_hindrance(tmp_path: Path):
    job = tmp_path / "job"
    _node(job, "node-a", [0, 1, 2, 3])
    Writer(job / "node-b")
    run = flexmodel.open(job)
    assert run.get("mlp").shape == (8, 3) and run.info.world == 4


def test_a_shard_of_another_folder_is_never_opened(tmp_path: Path):
    job, a, _ = _job(tmp_path)
    (tmp_path / "secret").mkdir()
    line = json.loads((a.root / "manifest.jsonl").read_text().splitlines()[0])["rec"]
    for step, name in enumerate(("../secret/shard-00000", "../../secret/x", "node-b/shard-00000")):
        a.line({**line, "step": 10 + step, "axes": [], "at": {**line["at"], "shard": name}})
        with pytest.raises(flexmodel.RunError, match="no name of a shard"):
            flexmodel.open(job).get("mlp", step=10 + step)
