"""Hooks of a job on two nodes with an agent each, that change while it runs: in one step on both, or on none."""

import contextlib
import json
import os
import pathlib
import signal
import stat
from collections.abc import Iterator

import flexmodel
import live
import tiny
import torch

import captures
import harness
import reference

NODES = ("left", "right")
FIRST = "layers.0.mlp; layers.1.mlp.down.weight:param"


class Session:
    """A job with a rank on each of two nodes."""

    def __init__(self, jobs: tuple[harness.Job, harness.Job], out: pathlib.Path, stop: pathlib.Path) -> None:
        self.jobs, self.out, self._stop = dict(zip(NODES, jobs, strict=True)), out, stop

    def ask(self, node: str, *words: str, code: int = 0) -> harness.Outcome:
        """`flexmodel hooks` on a node."""
        return harness.run(self.command(node, *words)).expect(code)

    def answers(self, node: str) -> bool:
        """Whether the agent of a node has ranks."""
        return harness.run(self.command(node)).code == 0

    def command(self, node: str, *words: str) -> list[str]:
        """Its command line."""
        return [harness.FLEXMODEL, "hooks", str(self.run_of(node)), *words]

    def run_of(self, node: str) -> pathlib.Path:
        """What the agent of a node writes."""
        return self.out / node

    def change(self, node: str, *words: str) -> dict:
        """The agent's answer."""
        return json.loads(self.ask(node, *words, "--json").out)

    def steps(self) -> int:
        """How many it has made."""
        return sum(job.out.count("step ") for job in self.jobs.values())

    def reach(self, step: int) -> None:
        """Returns once the job has made this step."""
        harness.wait_until(lambda: self.steps() > step, f"step {step}", job=self.jobs["left"])

    def pid_of(self, node: str, word: str) -> int:
        """The process of a node that has this word among the first of its command line."""
        for pid in self.jobs[node].pids():
            with contextlib.suppress(OSError):
                command = (pathlib.Path("/proc") / str(pid) / "cmdline").read_bytes().decode().split("\0")
                if any(part.endswith(word) for part in command[1:4]):
                    return pid
        raise AssertionError(word)

    def stop(self) -> flexmodel.Run:
        """Lets the job end: its run."""
        self._stop.touch()
        for job in self.jobs.values():
            job.wait().expect(0)
        return flexmodel.open(self.out)


@contextlib.contextmanager
def session(
    folder: pathlib.Path, out: str = "x/{node}", how: str = "fsdp2", read_only: str = "", **env: str
) -> Iterator[Session]:
    """A job that has made its first steps, with no hooks yet; the agent of the node `read_only` changes none."""
    stop, port = folder / "stop", str(harness.free_port())
    with contextlib.ExitStack() as stack:
        jobs = []
        for number, node in enumerate(NODES):
            torchrun = ["torchrun", "--nnodes", "2", "--node-rank", str(number), "--nproc-per-node", "1"]
            torchrun += ["--master-addr", "127.0.0.1", "--master-port", port]
            torchrun += [str(harness.PROGRAMS / "live.py"), how, str(stop)]
            where = str(folder / out).replace("NODE", node)
            options = ["--read-only"] if node == read_only else []
            command = [harness.FLEXMODEL, "run", "--hooks", "", "--out", where, *options, "--", *torchrun]
            jobs.append(stack.enter_context(harness.Job(command, harness.environment(FLEXMODEL_NODE=node, **env))))
        job = Session((jobs[0], jobs[1]), folder / "x", stop)
        job.reach(2)
        yield job


def wholes(module: str) -> list[torch.Tensor]:
    """What one process gives for each batch."""
    model, rows = tiny.build(), live.ROWS * len(NODES)
    recorder = reference.Recorder(model, module.__eq__)
    for number in range(live.BATCHES):
        recorder.forward_pass(number)
        model(tiny.batch(number, [rows], 0)[0])
    return [recorder.found[key] for key in sorted(recorder.found) if key.kind == "forward"]


def refused(job: Session, node: str, *words: str) -> str:
    """The one line with which a command is refused."""
    outcome = job.ask(node, *words, code=1)
    assert outcome.out == "" and len(outcome.err.splitlines()) == 1, outcome.text
    return outcome.err


def test_hooks_change_in_one_step_on_both_nodes(tmp_path):
    with session(tmp_path) as job:
        first = job.change("left", "add", FIRST)
        assert (first["revision"], first["ranks"]) == (1, 2)
        job.reach(first["step"] + 3)
        assert [clause["id"] for clause in job.change("right")["clauses"]] == [1, 2]
        second = job.change("right", "remove", "1")
        assert (second["revision"], second["ranks"]) == (2, 2)
        job.reach(second["step"] + 3)

        # Two at once: one leads.
        asked = [(node, harness.Job(job.command(node, "add", "lm_head", "--json"))) for node in NODES]
        with asked[0][1], asked[1][1]:
            answers = {node: each.wait() for node, each in asked}
        won = [json.loads(each.out) for each in answers.values() if each.code == 0]
        won.sort(key=lambda each: each["revision"])
        assert won and all(each.code == 0 or "is changing the hooks" in each.err for each in answers.values()), answers
        job.reach(won[-1]["step"] + 3)

        # A rank of the other node is stopped: nobody waits for longer than the bound, and nothing is changed.
        rank = job.pid_of("right", "live.py")
        os.kill(rank, signal.SIGSTOP)
        told = refused(job, "left", "add", "norm")
        os.kill(rank, signal.SIGCONT)
        assert "rank 1 has not confirmed" in told
        now = job.steps()
        job.reach(now + 3)

        # The other node's agent is killed: the command is told so, and the job goes on.
        os.kill(job.pid_of("right", "agent"), signal.SIGKILL)
        assert "rank 1 has not confirmed" in refused(job, "left", "add", "norm")
        job.reach(job.steps() + 3)
        run = job.stop()
    key = tmp_path / "x" / "hooks.key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    secret = key.read_text()
    for node, lines in ((node, job.run_of(node)) for node in NODES):
        revisions = [(each.revision, each.step) for each in flexmodel.open(lines).revisions]
        assert revisions[:2] == [(1, first["step"]), (2, second["step"])], node
        assert revisions[2:] == [(each["revision"], each["step"]) for each in won], node
        assert all(secret not in file.read_text() for file in (lines / "run.json", lines / "manifest.jsonl"))
    records = list(run["layers.0.mlp"])
    assert [record.step for record in records] == list(range(first["step"], second["step"]))
    assert all(record.complete and record.ranks == (0, 1) for record in records)
    expected = wholes("layers.0.mlp")
    for record in records:
        captures.expect_close({record.step: record.tensor()}, {record.step: expected[record.step % live.BATCHES]})
    assert "norm" not in run


def test_without_a_key_nothing_is_changed_and_the_job_goes_on(tmp_path):
    with session(tmp_path, "x/of-NODE") as job:
        told = refused(job, "of-left", "add", "lm_head")
        assert "FLEXMODEL_KEY" in told and "{node}" in told
        job.reach(job.steps() + 3)
        job.stop()
    assert not list(tmp_path.rglob("hooks.key"))


def test_an_agent_that_is_read_only_holds_for_the_job(tmp_path):
    with session(tmp_path, read_only="right") as job:
        harness.wait_until(lambda: job.answers("left"), "ranks that are attached", job=job.jobs["left"])
        told = refused(job, "left", "add", "lm_head")
        assert "that of node right" in told and "was started with --read-only" in told
        assert "--read-only" in refused(job, "right", "add", "lm_head")
        job.reach(job.steps() + 3)
        run = job.stop()
    assert run.revisions == [] and run.records == []


def test_by_a_key_that_is_given_ranks_with_passes_of_their_own_change_hooks(tmp_path):
    secret = "of 16 bytes at least"
    with session(tmp_path, "x/of-NODE", "apart", FLEXMODEL_KEY=secret) as job:
        left = job.jobs["left"]
        first = job.change("of-left", "add", "layers.0.mlp")
        assert (first["revision"], first["step"], first["ranks"]) == (1, None, 2)
        harness.wait_until(lambda: job.change("of-right")["revision"] == 1, "revision 1", job=left)
        # It may take another try, where the first change is yet to begin on the left.
        last = job.change("of-right", "set", "lm_head")["revision"]
        harness.wait_until(lambda: job.change("of-left")["revision"] == last, "the last revision", job=left)
        rank = pathlib.Path("/proc") / str(job.pid_of("left", "live.py"))
        assert b"FLEXMODEL_KEY" not in (rank / "environ").read_bytes()
        job.stop()
    for node in NODES:
        run = job.run_of(f"of-{node}")
        assert [each.revision for each in flexmodel.open(run).revisions] == [1, last]
        assert secret not in (run / "run.json").read_text() + (run / "manifest.jsonl").read_text()
