"""`assemble=collective` brings all parts of a tensor to one rank's agent, byte for byte what all agents would have.

It takes no harm from ranks that do not do alike.
"""

import fnmatch
import os
import pathlib
import signal
from collections.abc import Sequence

import flexmodel
import pytest
import torch

import captures
import harness
import layouts

PARAMETERS = ("lm_head", "layers.*.mlp")
HOOKS = f"**:{layouts.KINDS}@assemble=collective"
HOOKS += "".join(f";{name}:param,grad@assemble=collective" for name in PARAMETERS)
JOBS = {
    "fsdp2": layouts.WRAPPED["fsdp2"][0],
    "zero": layouts.ZERO,
    "tensor parallel": layouts.TENSOR_PARALLEL,
}


def assembled(outcome: harness.Outcome) -> dict[captures.Key, torch.Tensor]:
    """What HOOKS select of a job with `layouts.HOOKS`, whose tensors its one agent has made whole."""
    return {
        key: value
        for key, value in captures.read(outcome.run).items()
        if key.kind not in ("param", "grad") or any(fnmatch.fnmatch(key.module, f"{name}.*") for name in PARAMETERS)
    }


def two_nodes(folder: pathlib.Path, program: Sequence[str]) -> list[harness.Outcome]:
    """Rank 0 on node `left`, rank 1 on node `right`, each with an agent of its own, as Slurm starts them."""
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(harness.free_port()), "WORLD_SIZE": "2"}
    started = []
    for number, node in enumerate(("left", "right")):
        command = [harness.FLEXMODEL, "run", "--hooks", HOOKS, "--out", str(folder / node), "--", "python", *program]
        rank = {"FLEXMODEL_NODE": node, "RANK": str(number), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        started.append(harness.Job(command, harness.environment(**meet, **rank)))
    with started[0] as left, started[1] as right:
        return [left.wait(), right.wait()]


@pytest.mark.parametrize("name", JOBS)
def test_one_nodes_agent_gets_what_the_agents_of_all_would(name, run_once, tmp_path):
    one_node = run_once(JOBS[name], layouts.HOOKS).expect(0)
    left, right = two_nodes(tmp_path, harness.program_of(JOBS[name])[1])
    assert left.expect(0).losses == one_node.losses
    right.expect(0)
    run = captures.expect_sound(tmp_path / "left")
    assert all(record.complete for record in run.records) and not run.info.notices
    # What lies on rank 1 alone has no parts to be brought together.
    assert all(record.ranks == (1,) for record in flexmodel.open(tmp_path / "right").records)
    captures.expect_equal(captures.read(tmp_path / "left"), assembled(one_node))


CLAUSES = "up@assemble=collective;extra@assemble=collective;down:forward,backward@assemble=collective"
DIVERGE = {
    "skip": "rank 1 did not give its part of extra forward out at step 1, call 0.0; it is not gathered",
    "other": "rank 1 and rank 0 have different hooks; from now on the agents assemble",
    "none": "rank 1 did not come in time (does every rank have these hooks?); from now on the agents assemble",
}


@pytest.mark.parametrize("what", DIVERGE)
def test_ranks_that_do_otherwise_are_named_and_nothing_is_lost(what, run_once, untapped_once):
    argv = harness.on_ranks("diverging.py", what)
    outcome = run_once(argv, CLAUSES).expect(0)
    # Rank 1's hooks change nothing in the job.
    untapped = harness.on_ranks("diverging.py", what if what == "skip" else "nothing")
    assert outcome.losses == untapped_once(untapped).losses
    run = captures.expect_sound(outcome.run)
    assert f"assemble=collective: {DIVERGE[what]}" in run.info.notices
    # Each rank's agent has what it gave, whether or not it was brought together.
    gave = {(module, step): 2 for module in ("up", "extra", "down") for step in range(4)}
    if what == "skip":
        gave["extra", 1] = 1
    elif what == "other":
        gave |= {(module, step): 1 for module in ("extra", "down") for step in range(4)}
    assert {(r.module, r.step): len(r.parts) for r in run.records if r.kind == "forward"} == gave


def test_a_group_that_the_job_destroys_is_held_by_nothing_of_ours_and_the_next_one_is_named(run_once, untapped_once):
    argv = harness.on_ranks("groups.py")
    outcome = run_once(argv, "**@assemble=collective").expect(0)
    assert "group 0 is gone\n" in outcome.out and outcome.out == untapped_once(argv).out
    run = captures.expect_sound(outcome.run)
    assert (
        "assemble=collective: the job made another process group; from now on the agents assemble" in run.info.notices
    )
    assert {record.step for record in run.records if record.complete and len(record.parts) == 2} == {0, 1, 2, 3}


def test_without_a_store_in_which_ranks_can_meet_the_agents_assemble(run_once, untapped_once):
    argv = harness.python("fake_ranks.py")
    outcome = run_once(argv, "lm_head@assemble=collective").expect(0)
    assert outcome.losses == untapped_once(argv).losses
    run = captures.expect_sound(outcome.run)
    assert any(notice.endswith("from now on the agents assemble") for notice in run.info.notices)
    assert [record.step for record in run.records] == [0, 1]


@pytest.mark.parametrize("what", ["raise", "kill", "stop"])
def test_what_was_gathered_before_a_rank_gave_up_is_there_and_the_job_ends_as_it_would(what, tmp_path, untapped_once):
    out, go = tmp_path / "x", tmp_path / "go"
    argv = [harness.FLEXMODEL, "run", "--hooks", CLAUSES, "--out", str(out), "--"]
    argv += (harness.torchrun if what == "kill" else harness.on_ranks)("diverging.py", what)

    def steps(pending: bool = False) -> set[int]:
        try:
            records = flexmodel.open(out).records
            return {r.step for r in records if r.complete or (pending and r.pending and r.ranks == (0, 1))}
        except flexmodel.RunError:
            return set()

    with harness.Job(argv, harness.environment(GO=str(go))) as job:
        # The job waits for the file: what is there now was gathered while it ran. That the last pass is of both ranks
        # is known once they are past it.
        harness.wait_until(lambda: steps() == {0} and steps(pending=True) == {0, 1}, "two steps", job=job)
        go.touch()
        if what == "stop":
            harness.wait_until(lambda: any(map(_is_stopped, job.pids())), "a stopped rank", job=job)
            for pid in job.pids():
                os.kill(pid, signal.SIGCONT)
        outcome = job.wait()
    if what == "stop":
        assert outcome.expect(0).losses == untapped_once(harness.on_ranks("diverging.py", "nothing")).losses
        assert steps() == {0, 1, 2, 3}
        captures.expect_sound(out)
        return
    outcome.expect(1)
    assert ("ValueError: rank 1 gives up" if what == "raise" else "Signal 9") in outcome.err
    # The launcher ends the other rank wherever it is: what that was at is counted, and nothing else is lost.
    assert steps() >= {0, 1}
    assert flexmodel.open(out).info.totals.dropped <= 1
    harness.run([harness.FLEXMODEL, "verify", str(out)]).expect(0)


def _is_stopped(pid: int) -> bool:
    try:
        return (pathlib.Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False


STANDIN = harness.ROOT / "target" / "release" / "libnccl.so"


def over_nccl(folder: pathlib.Path, faults: str, argv: Sequence[str]) -> tuple[harness.Outcome, list[str]]:
    """A job whose tensors go over the stand-in for NCCL, and what that says, a line each."""
    log = folder / "nccl.log"
    standin = os.environ.get("FLEXMODEL_STANDIN", str(STANDIN))
    ranks, (program, *args) = harness.program_of(argv)
    outcome = harness.tapped(
        harness.on_ranks("with_standin.py", pathlib.Path(program).name, *args, ranks=ranks),
        HOOKS, folder / "x",
        FLEXMODEL_TEST_NCCL=standin, FLEXMODEL_NCCL_STANDIN_LOG=str(log), FLEXMODEL_NCCL_STANDIN=faults,
    )  # fmt: skip
    return outcome, log.read_text().splitlines() if log.exists() else []


@pytest.mark.parametrize("argv", [JOBS["fsdp2"], layouts.CROSSED], ids=["two ranks", "four ranks"])
def test_the_same_bytes_go_over_nccl_in_the_order_that_both_ends_know(argv, run_once, tmp_path):
    outcome, said = over_nccl(tmp_path, "trace", argv)
    one_node = run_once(argv, layouts.HOOKS).expect(0)
    assert outcome.expect(0).losses == one_node.losses
    run = captures.expect_sound(outcome.run)
    assert not run.info.notices
    # Every part that lies on another rank than the first one of its tensor was sent and received, and nothing else.
    moved = sum(len(r.parts) - 1 for r in run.records)
    assert [line for line in said if "trace: " not in line] == []
    assert sum(": send of " in line for line in said) == sum(": receive of " in line for line in said) == moved
    captures.expect_equal(captures.read(outcome.run), assembled(one_node))


@pytest.mark.parametrize(
    "fault", ["fail=ncclCommInitRankConfig:1:5@1", "fail=ncclGroupEnd:1:2@0", "error=1:6@1", "hang=ncclSend:40@1"]
)
def test_when_nccl_fails_the_agents_assemble_and_nothing_is_lost(fault, run_once, tmp_path):
    outcome, said = over_nccl(tmp_path, fault, JOBS["fsdp2"])
    one_node = run_once(JOBS["fsdp2"], layouts.HOOKS).expect(0)
    assert outcome.expect(0).losses == one_node.losses
    run = captures.expect_sound(outcome.run)
    assert any("the agents assemble" in notice or "not gathered" in notice for notice in run.info.notices)
    assert not [line for line in said if "violation" in line]
    captures.expect_equal(captures.read(outcome.run), assembled(one_node))
