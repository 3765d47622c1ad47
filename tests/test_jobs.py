"""Jobs, and attempts of one, that write into one run: nothing of one is put together with anything of another."""

import shlex

import elastic
import flexmodel
import pytest
import reused
import torch
import torch.distributed as dist
from flexmodel_inside import ranks
from torch.distributed import distributed_c10d as c10d
from torch.testing._internal.distributed.fake_pg import FakeStore

import captures
import harness

HOOKS = "layers.*.mlp:forward,backward"


def test_jobs_at_once_and_in_turn_are_jobs_of_their_own(tmp_path, run_once):
    jobs = [harness.on_ranks("ddp.py", "3", rows) for rows in ("4", "6")] + [harness.python("plain.py", "3", "5")]
    one, other, last = map(shlex.join, jobs)
    outcome = harness.tapped(["bash", "-c", f"{one} & {other} & wait; {last}"], HOOKS, tmp_path / "x").expect(0)
    run = captures.expect_sound(outcome.run)
    assert [(job.job, job.attempt) for job in run.jobs] == [(0, 0), (1, 0), (2, 0)]
    assert sorted(job.world for job in run.jobs[:2]) == [2, 2] and run.jobs[2].world == 1
    for number, job in enumerate(run.jobs):
        (argv,) = [argv for argv in jobs if list(job.command[1:]) == argv[-3:]]
        captures.expect_equal(
            captures.read(outcome.run, job=number), captures.read(run_once(argv, HOOKS).expect(0).run)
        )
    # What is asked for without a word is the newest job's.
    assert run.get("layers.0.mlp", step=0).shape[0] == 5
    assert run.get("layers.0.mlp", step=0, job=0).shape[0] in (8, 12)
    with pytest.raises(KeyError, match="job is 0 to 2"):
        run.get("layers.0.mlp", step=0, job=3)

    def said(*argv: str) -> str:
        return harness.run([harness.FLEXMODEL, *argv]).expect(0).out

    assert "3 jobs" in said("ls", str(outcome.run)) and "job  attempt" in said("ls", str(outcome.run))
    assert "[5, " in said("show", str(outcome.run), "layers.0.mlp", "--kind", "forward")
    assert "job 1, attempt 0" in said("show", str(outcome.run), "layers.0.mlp", "--job", "1")


def test_rows_of_one_attempt_are_never_put_together_with_those_of_another(tmp_path):
    argv = ["torchrun", "--standalone", "--nproc-per-node", "2", "--max-restarts", "2"]
    argv.append(str(harness.PROGRAMS / "elastic.py"))
    outcome = harness.tapped(argv, "probe", tmp_path / "x", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1").expect(0)
    harness.run([harness.FLEXMODEL, "verify", str(outcome.run)]).expect(0)
    run = flexmodel.open(outcome.run)
    assert [(job.job, job.attempt, job.world) for job in run.jobs] == [(0, 0, 2), (0, 1, 2), (0, 2, 2)]
    whole = {}
    for record in run["probe"]:
        ranks = [rank for rank in (0, 1) if rank in record.ranks]
        for rank in ranks:
            assert set(record.part(rank).flatten().tolist()) == {elastic.value(record.attempt, rank, record.step)}
        if record.complete and record.apart is None:
            whole[record.attempt, record.step] = record.tensor()[:, 0].tolist()
    expected = [(attempt, step) for attempt, steps in enumerate((3, 3, 1)) for step in range(steps)]
    assert sorted(whole) == expected, "the step in which a rank was lost is never whole"
    for (attempt, step), rows in whole.items():
        assert rows == [elastic.value(attempt, rank, step) for rank in (0, 0, 1, 1)]
    # Steps of an earlier attempt are not those of the newest.
    assert run.get("probe", step=0)[0, 0] == elastic.value(2, 0, 0)
    with pytest.raises(KeyError, match=r"step is 0 in the newest; job=0 attempt=0, job=0 attempt=1"):
        run.get("probe", step=2)
    assert torch.equal(run.get("probe", step=2, attempt=1)[:, 0], torch.tensor([102.0, 102.0, 112.0, 112.0]))


def test_a_process_that_comes_back_as_another_rank_is_one_of_another_job(tmp_path, run_once):
    argv = harness.python("reused.py", str(tmp_path))
    outcome = harness.tapped(argv, HOOKS, tmp_path / "x").expect(0)
    run = captures.expect_sound(outcome.run)
    assert [(job.job, job.world) for job in run.jobs] == [(0, 2), (1, 2)]
    assert all(record.complete and len(record.parts) == 2 for record in run.records)
    alone = captures.read(run_once(harness.on_ranks("fsdp2.py"), HOOKS).expect(0).run)
    for number in range(reused.TURNS):
        # Steps are the process's, and go on.
        found = captures.read(outcome.run, job=number)
        found = {key._replace(step=key.step % 3): value for key, value in found.items()}
        captures.expect_equal(found, alone)


def test_ranks_draw_one_number_whenever_they_look_and_each_attempt_another(tmp_path, monkeypatch):
    tcp = dist.TCPStore("127.0.0.1", harness.free_port(), is_master=True)
    for store in (dist.HashStore(), dist.FileStore(str(tmp_path / "store"), -1), tcp):
        prefixed = dist.PrefixStore("default_pg", store)
        monkeypatch.setattr(c10d, "_get_default_store", lambda prefixed=prefixed: prefixed)
        monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
        first = ranks._draw(c10d)
        assert first == ranks._draw(c10d) > 0
        # torchrun keeps its store for the next attempt.
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        assert ranks._draw(c10d) not in (0, first)
    monkeypatch.setattr(c10d, "_get_default_store", FakeStore)
    assert ranks._draw(c10d) == 0
