"""What a rank takes of the machine's memory: a small slab, larger ones if an agent reads, never more than there is."""

import os
import pathlib
import re

import flexmodel
import pytest
import torch

import captures
import harness

MIB = 1 << 20
THREADS, CALLS, ROWS = 3, 40, 256
"""threads.py: outputs of 1 MiB from several threads at once, as large as the first slab."""


def _slabs(pid: int) -> list[int]:
    """Bytes of each slab that a process has mapped."""
    lines = pathlib.Path(f"/proc/{pid}/maps").read_text().splitlines()
    ranges = [line.split()[0].split("-") for line in lines if "memfd:flexmodel-slab" in line]
    return [int(end, 16) - int(start, 16) for start, end in ranges]


def _ranks(job: harness.Job) -> list[int]:
    """Processes of the job that have a slab, but for the agent."""
    found = []
    for pid in job.pids():
        try:
            if b"flexmodel" not in pathlib.Path(f"/proc/{pid}/comm").read_bytes() and _slabs(pid):
                found.append(pid)
        except OSError:  # it has ended
            pass
    return found


def test_small_records_cost_the_small_slab(tmp_path):
    """Some hundred bytes each."""
    stop = tmp_path / "stop"
    program = harness.python("until.py", str(stop))
    with harness.agent(tmp_path / "x", tmp_path / "s") as agent:
        env = harness.preloaded("norm:param", tmp_path / "s")
        with harness.Job(program, env) as job:
            job.wait_for_line("step 3 ")
            harness.wait_until(lambda: _slabs(agent.process.pid) == [MIB], "the slab", job=job)
            (rank,) = _ranks(job)
            assert _slabs(rank) == [MIB]
            stop.touch()
            job.wait().expect(0)
    captures.expect_sound(tmp_path / "x")


def _expect_all(out: pathlib.Path, ranks: int) -> None:
    import threads

    records = flexmodel.open(out).records
    assert len(records) == THREADS * CALLS
    for record in records:
        number = int(record.module.removeprefix("same"))
        expected = torch.cat([threads.value(rank, number, record.step, ROWS) for rank in range(ranks)])
        assert captures.same_bytes(record.tensor(), expected), record


def test_large_tensors_of_several_threads_reach_larger_slabs_whole(tmp_path):
    stop = tmp_path / "stop"
    program = harness.on_ranks("threads.py", str(THREADS), str(CALLS), str(ROWS), str(stop))
    with harness.agent(tmp_path / "x", tmp_path / "s") as agent:
        env = harness.preloaded("same*:forward", tmp_path / "s", FLEXMODEL_SLAB="12M")
        with harness.Job(program, env) as job:
            harness.wait_until(lambda: job.out.count("at ") >= 8, "some calls", job=job)
            pids = _ranks(job)
            assert len(pids) == 2
            harness.wait_until(lambda: all(max(_slabs(pid)) >= 4 * MIB for pid in pids), "larger slabs", job=job)
            assert all(sum(_slabs(pid)) <= 12 * MIB for pid in pids)
            stop.touch()
            job.wait().expect(0)
        assert agent.process.poll() is None
    captures.expect_sound(tmp_path / "x")
    _expect_all(tmp_path / "x", 2)


def test_an_agent_that_is_killed_and_started_again_loses_and_doubles_nothing(tmp_path):
    """Whatever was not given up by a rank while there was no agent is there once; the rest is counted."""
    out, socket, stop = tmp_path / "x", tmp_path / "s", tmp_path / "stop"
    program = harness.on_ranks("threads.py", str(THREADS), "0", "64", str(stop))
    env = harness.preloaded("same*:forward", socket, FLEXMODEL_SLAB="6M")
    with harness.Job(program, env) as job:
        for _ in range(2):
            with harness.agent(out, socket) as agent:
                before = _parts(out)
                harness.wait_until(lambda before=before: _parts(out) >= before + 20, "more parts", job=job)
                agent.process.kill()
                agent.process.wait()
            socket.unlink()
        with harness.agent(out, socket):
            stop.touch()
            ended = job.wait().expect(0)
    calls = sum(map(int, re.findall(r"^done \d (\d+)$", ended.out, re.MULTILINE)))
    harness.run([harness.FLEXMODEL, "verify", str(out)]).expect(0)
    run = flexmodel.open(out)
    assert run.info.totals.parts == sum(len(record.parts) for record in run.records)
    assert run.info.totals.parts + run.info.totals.dropped == calls


def _parts(out: pathlib.Path) -> int:
    try:
        return (out / "manifest.jsonl").read_bytes().count(b'"t":"part"')
    except OSError:
        return 0


def _agent_of(job: harness.Job) -> int:
    """The agent that `flexmodel run` has started."""

    def found() -> list[int]:
        pids = []
        for pid in job.pids():
            try:
                if b"--child" in pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                    pids.append(pid)
            except OSError:  # it has ended
                pass
        return pids

    harness.wait_until(lambda: len(found()) == 1, "the agent", job=job)
    return found()[0]


HOOKS = "layers.*.mlp:forward,backward"
A_STEP = 2 * 2
"""Modules and kinds."""


def _run_until(tmp_path: pathlib.Path, *options: str, **env: str) -> tuple[harness.Job, pathlib.Path]:
    stop = tmp_path / "stop"
    command = [harness.FLEXMODEL, "run", "--hooks", HOOKS, "--out", str(tmp_path / "x"), *options, "--"]
    return harness.Job([*command, *harness.python("until.py", str(stop))], harness.environment(**env)), stop


def _expect_accounted(outcome: harness.Outcome, out: pathlib.Path) -> flexmodel.Run:
    """Every capture is stored or counted as dropped, in the summary and in the run."""
    run = flexmodel.open(out)
    totals = run.info.totals
    assert totals.parts + totals.dropped == A_STEP * len(outcome.losses), (totals, outcome.text)
    assert totals.parts == sum(len(record.parts) for record in run.records)
    assert sum(lost.count for lost in run.dropped) == totals.dropped
    assert int(re.search(r"(\d+) dropped", outcome.err)[1]) == totals.dropped
    return run


@pytest.mark.parametrize("slab", ["1M", "64M"])
def test_what_was_captured_after_the_agents_death_is_dropped_in_the_summary(slab, tmp_path):
    job, stop = _run_until(tmp_path, FLEXMODEL_SLAB=slab)
    with job:
        job.wait_for_line("step 5 ")
        agent = _agent_of(job)
        harness.wait_until(lambda: _parts(tmp_path / "x") > 4, "some parts", job=job)
        os.kill(agent, 9)
        job.wait_for_line("step 40 ")
        stop.touch()
        outcome = job.wait().expect(0)
    assert _expect_accounted(outcome, tmp_path / "x").info.totals.dropped > 0


def test_a_rank_that_is_killed_after_its_agent_has_lost_what_it_captured(tmp_path):
    job, _ = _run_until(tmp_path)
    with job:
        job.wait_for_line("step 5 ")
        agent = _agent_of(job)
        (rank,) = _ranks(job)
        os.kill(agent, 9)
        at = len([line for line in job.out.splitlines() if line.startswith("step ")])
        harness.wait_until(lambda: f"step {at + 5} " in job.out, "more steps", job=job)
        os.kill(rank, 9)
        outcome = job.wait().expect(137)
    totals = flexmodel.open(tmp_path / "x").info.totals
    # It may have been killed in the middle of a step, and before it printed the last one.
    assert 0 <= totals.parts + totals.dropped - A_STEP * len(outcome.losses) <= 2 * A_STEP


def test_a_rank_that_an_agent_without_descriptors_cannot_take_in_has_dropped_all(tmp_path):
    import resource

    job, stop = _run_until(tmp_path)
    with job:
        agent = _agent_of(job)
        harness.wait_until(lambda: "live at" in job.err, "the agent, ready", job=job)
        few = len(os.listdir(f"/proc/{agent}/fd"))
        resource.prlimit(agent, resource.RLIMIT_NOFILE, (few, few))
        job.wait_for_line("step 60 ")
        stop.touch()
        outcome = job.wait().expect(0)
    totals = _expect_accounted(outcome, tmp_path / "x").info.totals
    assert totals.parts == 0


def test_a_rank_without_shared_memory_says_so_once_and_has_dropped_all(tmp_path):
    # In blocks of 512 bytes: a quarter of a MiB. Python ignores the signal that comes with the error.
    stop, limited = tmp_path / "stop", 'ulimit -f 512; exec "$@"'
    command = [harness.FLEXMODEL, "run", "--hooks", HOOKS, "--out", str(tmp_path / "x"), "--"]
    command += ["sh", "-c", limited, "sh"]
    with harness.Job([*command, *harness.python("until.py", str(stop))], harness.environment()) as job:
        job.wait_for_line("step 20 ")
        stop.touch()
        outcome = job.wait().expect(0)
    assert outcome.err.count("captures are dropped") == 1, outcome.text
    totals = _expect_accounted(outcome, tmp_path / "x").info.totals
    assert totals.parts == 0


def test_more_than_the_machine_has_is_not_asked_for(tmp_path):
    """The job is told of enough ranks here that a slab of 1 MiB fits for each, and few larger ones."""
    available = int(re.search(r"MemAvailable:\s+(\d+) kB", pathlib.Path("/proc/meminfo").read_text())[1]) << 10
    ranks = str(available // (6 * MIB))
    outcome = harness.tapped(
        harness.python("footprint.py", "60"), "*:forward", tmp_path / "x", FLEXMODEL_SLAB="64G", LOCAL_WORLD_SIZE=ranks
    ).expect(0)
    captures.expect_sound(tmp_path / "x")
    (line,) = [line for line in outcome.err.splitlines() if "of memory that are free here" in line]
    assert f"for each of {ranks} ranks" in line and "GiB" in line and "FLEXMODEL_SLAB" in line, line
    shared = int(re.search(r"shared (\d+)", outcome.out)[1]) << 10
    assert shared < 8 * MIB
