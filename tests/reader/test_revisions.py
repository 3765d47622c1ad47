"""Hooks that changed while a job ran: which there were, and of which a record is."""

from __future__ import annotations

from pathlib import Path

import flexmodel
import numpy as np
from run_writer import Writer, axis, shard


def revision(writer: Writer, number: int, begins: int | None, clauses: dict[int, str], **changed: object) -> None:
    plan = [{"id": key, "text": text} for key, text in clauses.items()]
    told = {"rule": "optimizer", "ranks": 2, "time_ns": 9, **changed}
    writer.line({"t": "revision", "revision": number, "begins": begins, "clauses": plan, **told})


def test_a_run_lists_the_revisions_and_each_record_says_of_which_it_is(run_dir: Writer):
    run_dir.part("m", np.array([0]), step=0)
    run = flexmodel.open(run_dir.root)
    assert (run.revisions, [r.revision for r in run.records]) == ([], [0])
    revision(run_dir, 1, 120, {1: "layers.*.mlp", 4: "lm_head:forward"})
    run_dir.part("m", np.array([1]), step=120, revision=1)
    revision(run_dir, 2, None, {})
    revision(run_dir, 3, 7, {5: "m"}, rule="inference")
    assert run.refresh() == 1
    assert [(r.step, r.revision) for r in run["m"]] == [(0, 0), (120, 1)]
    first, alone, inference = run.revisions
    assert first == flexmodel.Revision(
        revision=1, step=120, clauses={1: "layers.*.mlp", 4: "lm_head:forward"}, job=0, attempt=0, begins=120,
        rule="optimizer", ranks=2, time_ns=9,
    )  # fmt: skip
    assert (alone.step, alone.begins, alone.clauses) == (None, None, {})
    assert (inference.step, inference.begins, inference.rule) == (None, 7, "inference")
    assert len({first, alone, inference}) == 3
    assert run.problems == []


def test_a_revision_that_several_nodes_tell_of_is_one(tmp_path: Path):
    for rank, groups in enumerate((("x", "y"), ("y", "x"))):
        writer = Writer(tmp_path / f"node-{rank}", world=2)
        for job, group in enumerate(groups):
            info = {"group": group, "launch": "", "launcher": "", "world": 2, "command": [], "hooks": ""}
            writer.line({"t": "job", "job": job, "attempt": 0, **info, "started_ns": 1})
            number = 3 if group == "x" else 0
            if number:
                revision(writer, number, 5, {1: "m"}, job=job)
            axes = [axis(rank, 2, shard(0))]
            writer.part("m", np.array([rank]), rank=rank, axes=axes, job=job, step=5, revision=number)
    run = flexmodel.open(tmp_path)
    (of_x,) = [job.job for job in run.jobs if job.group == "x"]
    assert [(r.revision, r.step, r.job) for r in run.revisions] == [(3, 5, of_x)]
    assert sorted((r.job == of_x, r.revision, r.complete) for r in run["m"]) == [(False, 0, True), (True, 3, True)]


def test_a_revision_that_cannot_be_costs_its_line(run_dir: Writer):
    revision(run_dir, 0, 1, {1: "m"})
    revision(run_dir, 1, 1, {1: "m" * 50_000})
    revision(run_dir, 2, 1, {1: "m"}, rule="never")
    run_dir.part("m", np.array([1]), revision=2)
    run = flexmodel.open(run_dir.root)
    assert len(run.problems) == 3 and run.revisions == []
    assert [r.revision for r in run.records] == [2]
