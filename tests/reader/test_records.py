"""Finding records of small runs: what a run says it holds, and what it says of what it lacks."""

from __future__ import annotations

from pathlib import Path

import flexmodel
import numpy as np
import pytest
from run_writer import Writer, axis, raises, shard


@pytest.fixture
def run(run_dir: Writer) -> flexmodel.Run:
    kinds = {"": 0, "layers.2": 1, "layers.10": 3, "head": 0}
    modules = [{"name": name, "class": "M", "kinds": bits} for name, bits in kinds.items()]
    run_dir.info(models=[{"model": 0, "modules": modules}], notices=["hook 2 matches nothing"], hooks="layers.*")
    for step in range(3):
        for micro in (1, 0):
            for module in ("layers.10", "layers.2", ""):
                run_dir.part(module, np.array([step, micro]), step=step, micro=micro)
    run_dir.part("layers.2", np.array([1]), kind="forward_pre", path="in[0]")
    run_dir.part("layers.2", np.array([2]), kind="forward_pre", path="in.states")
    run_dir.part("layers.10", np.array([3]), kind="backward", path="in[0]")
    run_dir.part("layers.2.weight", np.array([4]), kind="param", path="")
    what = run_dir.what("layers.3", "float32", (1,), 0, [])
    run_dir.line({"t": "refused", **what, "reason": "a sparse tensor"})
    return flexmodel.open(run_dir.root)


def test_a_run_says_what_it_holds(run: flexmodel.Run):
    assert run.modules == ["", "layers.2", "layers.2.weight", "layers.10"]
    assert len(run.records) == 22
    assert (run.info.command, run.info.hooks, run.notices) == (
        ("python", "train.py"), "layers.*", ("hook 2 matches nothing",),
    )  # fmt: skip
    assert run.models[0].modules[2] == flexmodel.ModuleInfo("layers.10", "M", ("forward", "forward_pre"))
    refused = [(r.module, r.kind, r.step, r.reason) for r in run.refused]
    assert refused == [("layers.3", "forward", 0, "a sparse tensor")]
    assert run.problems == []
    assert "22 records of 4 modules, not finished" in repr(run)
    assert "(root)" in run and "head" not in run


def test_records_of_a_module_are_in_order_of_step_and_microbatch(run: flexmodel.Run):
    forward = [r for r in run["layers.2"] if r.kind == "forward"]
    assert [(r.step, r.micro) for r in forward] == [(s, m) for s in range(3) for m in range(2)]
    assert [r.tensor().tolist() for r in forward] == [[r.step, r.micro] for r in forward]


def test_the_model_itself_has_two_names(run: flexmodel.Run):
    assert run.get("", step=1, micro=0).tolist() == run.get("(root)", step=1, micro=0).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("module", "fields", "message"),
    [
        ("layers.2", {}, r"layers.2 has 6 records forward; say which: step= \(0 to 2\), micro= \(0, 1\)"),
        ("layers.2", {"step": 9}, "layers.2 has no forward with step=9; step is 0 to 2"),
        ("layers.2", {"kind": "backward"}, "has nothing of kind backward; it has forward, forward_pre"),
        ("layers.2", {"kind": "gradient"}, "no kind 'gradient'; kinds are forward, forward_pre, backward"),
        ("layers.2", {"kind": "forward_pre"}, r"say which: path= \(in\[0\], in.states\)"),
        ("layers.10", {"kind": "backward", "path": "out"}, "of the outputs is kind 'backward_pre'"),
        ("layers.22", {}, "layers.22 is not captured; the nearest are layers.2"),
        ("head", {}, "head is in the model, but nothing of it is captured"),
        ("layers.3", {}, "layers.3 was refused 1 times: a sparse tensor"),
        ("zzz", {}, r"zzz is not captured; captured are \(root\), layers.2"),
    ],
)
def test_asking_for_what_is_not_there_says_what_is(run: flexmodel.Run, module: str, fields: dict, message: str):
    with pytest.raises(KeyError, match=message) as error:
        run.get(module, **fields)
    assert isinstance(error.value, flexmodel.NotCapturedError)
    assert not str(error.value).startswith(("'", '"')), "KeyError's repr of a sentence"


def test_one_record_needs_no_fields(run: flexmodel.Run):
    assert run.get("layers.2.weight", kind="param").tolist() == [4]
    assert run.get("layers.2", kind="forward_pre", path="in.states").tolist() == [2]


def test_a_running_job_is_read_as_it_writes(run_dir: Writer):
    run = flexmodel.open(run_dir.root)
    with raises("holds no records"):
        run.get("m")
    run_dir.part("m", np.array([1]), rank=0, axes=[axis(0, 2, shard(0))])
    assert run.refresh() == 1
    with raises("run.refresh"):
        run.get("m")
    old = run.records[0]
    manifest = run_dir.root / "manifest.jsonl"
    before = manifest.read_bytes()
    run_dir.part("m", np.array([2]), rank=1, axes=[axis(1, 2, shard(0))])
    after = manifest.read_bytes()
    manifest.write_bytes(after[:-5])  # half of the last line
    run = flexmodel.open(run_dir.root)
    assert (run.refresh(), run.problems, len(run.records)) == (0, [], 1)
    with manifest.open("r+b") as file:
        file.write(after)
    assert before in after and run.refresh() == 1
    run_dir.seal()
    assert run.get("m").tolist() == [1, 2]
    assert not old.complete


def test_a_run_written_anew_in_the_same_place_is_read_anew(run_dir: Writer):
    manifest = run_dir.root / "manifest.jsonl"
    for step in range(2):
        run_dir.part("m", np.array([step]), step=step)
    run = flexmodel.open(run_dir.root)
    manifest.write_bytes(b"")
    run_dir.part("n", np.array([7]))
    assert run.refresh() == 1
    assert (run.modules, run.get("n").tolist()) == (["n"], [7])


def test_values_that_are_equal_mean_the_same_record(run: flexmodel.Run):
    wanted = run.get("layers.2", step=1, micro=0).tolist()
    for fields in ({"step": 1.0}, {"step": np.int64(1)}, {"step": True}, {"train": 1}, {"train": np.bool_(True)}):
        assert run.get("layers.2", **{"step": 1, "micro": 0, **fields}).tolist() == wanted
    assert run.get("layers.2", step=1, micro=0, rank=0.0).tolist() == wanted


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"step": 1.5}, KeyError, "no record has step=1.5"),
        ({"step": float("nan")}, KeyError, "no record has step=nan"),
        ({"step": 2**200}, KeyError, "no record has step=1606938044258990"),
        ({"step": "1"}, TypeError, "step is a number, not str"),
        ({"train": "yes"}, TypeError, "train is True or False, not str"),
        ({"train": 0}, KeyError, "has no forward with train=False"),
        ({"kind": 5}, TypeError, "kind is a str, not int"),
        ({"path": "out\udcff"}, KeyError, "there is no path out.*: it has lone surrogates"),
    ],
)
def test_a_value_that_no_record_can_have_is_an_error_that_says_so(run, fields, error, message):
    with raises(message, error):
        run.get("layers.2", **fields)


def test_a_module_that_is_no_text_is_none_of_the_run(run: flexmodel.Run):
    for module in ("layers\udcff.2", 5, None, ["layers.2"]):
        assert module not in run
    for look in (run.get, run.__getitem__):
        with raises("there is no module layers.*: it has lone surrogates"):
            look("layers\udcff.2")
        with raises("module is a str, not int", TypeError):
            look(5)


def test_a_coordinate_outside_of_its_axis_costs_its_part_and_is_named(run_dir: Writer):
    for rank in (0, 1):
        run_dir.part("m", np.array([rank]), rank=rank, axes=[axis(2 * rank, 2, shard(0))])
    run = flexmodel.open(run_dir.root)
    assert len(run.problems) == 1 and run.problems[0].endswith("line 2 is skipped: it says dp 2 of 2")
    with raises("m forward out step 0 micro 0 call 0 is incomplete: no part of dp 1 of 2"):
        run.get("m")


def test_what_is_asked_for_is_of_the_newest_attempt_that_has_the_module(tmp_path: Path):
    writer = Writer(tmp_path / "run", world=1)
    for job, attempt, steps in ((0, 0, 3), (0, 1, 2), (1, 0, 1)):
        info = {"group": f"{job}{attempt}", "launch": "x", "launcher": "", "world": 1, "command": [], "hooks": ""}
        writer.line({"t": "job", "job": job, "attempt": attempt, **info, "started_ns": 1})
        for step in range(steps):
            value = np.float32([100 * job + 10 * attempt + step])
            writer.part("m", value, job=job, attempt=attempt, step=step)
        if job == 0:
            writer.part("old", np.zeros(1, np.float32), job=job, attempt=attempt)
    run = flexmodel.open(tmp_path / "run")
    assert [(job.job, job.attempt, job.group) for job in run.jobs] == [(0, 0, "00"), (0, 1, "01"), (1, 0, "10")]
    expected = [(0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 1, 0), (0, 1, 1), (1, 0, 0)]
    assert [(r.job, r.attempt, r.step) for r in run["m"]] == expected
    assert run.get("m").item() == 100
    assert run.get("m", job=0, step=1).item() == 11
    assert run.get("m", job=0, attempt=0, step=2).item() == 2
    assert (run["old"][-1].job, run.get("old").item()) == (0, 0)
    with raises("step is 0 in the newest; job=0 attempt=0, job=0 attempt=1"):
        run.get("m", step=1)
    with raises("m has no forward with attempt=2; attempt is 0"):
        run.get("m", attempt=2)
    assert str(run["m"][3]) == "m forward out step 0 micro 0 call 0 attempt 1"


def test_what_is_called_the_same_is_kept_beside_the_first(tmp_path: Path):
    writer = Writer(tmp_path / "run", world=2)
    for value in (1, 2):
        for rank in (0, 1):
            rows = np.full((2, 1), 10 * rank + value, np.float32)
            writer.part("m", rows, rank=rank, axes=[axis(rank, 2, shard(0))])
    run = flexmodel.open(tmp_path / "run")
    assert [(r.again, r.tensor().flatten().tolist()) for r in run.records] == [(0, [1, 1, 11, 11]), (1, [2, 2, 12, 12])]
    assert run.get("m")[0].item() == 1 and run.get("m", again=1)[0].item() == 2
    writer.part("m", np.full((2, 1), 3, np.float32), axes=[axis(0, 2, shard(0))])
    assert run.refresh() == 1
    assert [(r.again, r.complete) for r in run["m"]] == [(0, True), (1, True), (2, False)]
