"""Hooks that change while the job runs: in one step on all ranks, with the right tensors from that step on."""

import contextlib
import http.client
import json
import os
import pathlib
import signal
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import flexmodel
import live
import pipeline
import pytest
import tensor_parallel
import tiny
import torch

import captures
import harness
import reference

RANKS = dict.fromkeys(live.ALONE, 1)
"""Of those that have not two."""

FIRST = "layers.0.mlp; lm_head:backward_pre; layers.1.mlp.down.weight:param,grad"
EDIT = "layers.1.mlp|scale(0.5)"


class Session:
    """A job of `live.py` whose hooks are changed."""

    def __init__(self, job: harness.Job, out: pathlib.Path, stop: pathlib.Path) -> None:
        self.job, self.out, self._stop = job, out, stop

    def ask(self, *words: str, code: int = 0) -> harness.Outcome:
        """`flexmodel hooks`."""
        return harness.run([harness.FLEXMODEL, "hooks", str(self.out), *words]).expect(code)

    def answers(self) -> bool:
        """Whether an agent with ranks does."""
        return harness.run([harness.FLEXMODEL, "hooks", str(self.out)]).code == 0

    def change(self, *words: str) -> dict[str, Any]:
        """The same, with the agent's answer."""
        return json.loads(self.ask(*words, "--json").out)

    def steps(self) -> int:
        """How many it has made."""
        return self.job.out.count("\nstep ") + self.job.out.startswith("step ")

    def reach(self, step: int) -> None:
        """Returns once the job has made this step."""
        harness.wait_until(lambda: self.steps() > step, f"step {step}", job=self.job)

    def reach_revision(self, revision: int) -> None:
        """Returns once it is in force."""
        harness.wait_until(lambda: self.change()["revision"] == revision, f"revision {revision}", job=self.job)

    def stop(self) -> harness.Outcome:
        """Lets the job end."""
        self._stop.touch()
        outcome = self.job.wait()
        outcome.run = self.out
        return outcome


@contextlib.contextmanager
def session(
    how: str, folder: pathlib.Path, hooks: str = "", launcher: list[str] | None = None, **env: str
) -> Iterator[Session]:
    """A job that has made its first steps."""
    out, stop = folder / "run", folder / "stop"
    program = ["live.py", how, str(stop)]
    ranks = RANKS.get(how, 2)
    argv = harness.python(*program) if ranks == 1 else harness.on_ranks(*program, ranks=ranks)
    if launcher is not None:
        argv = [*launcher, str(harness.PROGRAMS / program[0]), *program[1:]]
    command = [harness.FLEXMODEL, "run", "--hooks", hooks, "--out", str(out), "--", *argv]
    with harness.Job(command, harness.environment(**env)) as job:
        each = Session(job, out, stop)
        each.reach(2)
        harness.wait_until(each.answers, "ranks that are attached", job=job)
        yield each


def expected(how: str) -> dict[tuple[str, str], list[torch.Tensor]]:
    """What one process computes for each batch: by module and kind, of the mean loss of all rows."""
    build = {"tp": tensor_parallel.build, "staged": pipeline.build, "served": pipeline.build}.get(how, tiny.build)
    model = build()
    rows = live.ROWS * RANKS.get(how, 2)
    wanted = ("embed", "layers.0.mlp", "layers.1.mlp", "norm", "lm_head")
    recorder = reference.Recorder(model, wanted.__contains__)
    found: dict[tuple[str, str], list[torch.Tensor]] = {}
    for number in range(live.BATCHES):
        recorder.forward_pass(number)
        tokens, targets = tiny.batch(number, [rows], 0)
        model.zero_grad()
        tiny.loss_of(model(tokens), targets).backward()
        for name, parameter in model.named_parameters():
            found.setdefault((name, "param"), []).append(parameter.detach().clone())
            found.setdefault((name, "grad"), []).append(parameter.grad.clone())
    for key in sorted(recorder.found):
        found.setdefault((key.module, key.kind), []).append(recorder.found[key])
    return found


def expect_records(run: flexmodel.Run, how: str, module: str, kind: str, steps: Iterable[int]) -> None:
    """Records of all of these steps, and of no others, and each is the one of its batch."""
    records = [record for record in run[module] if record.kind == kind]
    assert [record.step for record in records] == list(steps), (module, kind, steps)
    wholes = expected(how)[module, kind]
    for record in [*records[: live.BATCHES], *records[-live.BATCHES :]]:
        # Of the job's own loss, which is that of a rank's rows.
        of_job = record.dp_size if kind.startswith("backward") else 1
        whole = wholes[record.step % live.BATCHES]
        captures.expect_close({record.step: record.tensor() / of_job}, {record.step: whole})


TRAINING = ["plain", "ddp", "fsdp1", "fsdp2", "compiled_ddp", "compiled_fsdp2", "tp", "zero3", "staged"]


@pytest.mark.parametrize("how", TRAINING)
def test_hooks_come_change_and_go_in_one_step_on_all_ranks(how, tmp_path):
    with session(how, tmp_path) as job:
        assert job.change() == {"job": 0, "revision": 0, "clauses": [], "ranks": RANKS.get(how, 2), "pending": None}
        first = job.change("add", FIRST)
        assert first["revision"] == 1 and first["ranks"] == RANKS.get(how, 2)
        job.reach(first["step"] + 5)
        clauses = [{"id": n, "text": text} for n, text in enumerate(FIRST.split("; "), 1)]
        assert job.change()["clauses"] == clauses
        second = job.change("add", f"layers.1.mlp; {EDIT}")
        job.reach(second["step"] + 5)
        third = job.change("remove", "1", "2", "5")
        job.reach(third["step"] + 5)
        fourth = job.change("set", "layers.1.mlp:forward@assemble=collective")
        job.reach(fourth["step"] + 5)
        fifth = job.change("remove", "6")
        job.reach(fifth["step"] + 5)
        # Ranks that have left their communicator make another one.
        sixth = job.change("add", "layers.0.mlp@assemble=collective")
        job.reach(sixth["step"] + 5)
        last = job.change("set", "lm_head@steps=0..0")
        job.reach(last["step"] + 5)
        outcome = job.stop().expect(0)
    steps = [answer["step"] for answer in (first, second, third, fourth, fifth, sixth, last)]
    s1, s2, s3, s4, s5, s6, s7 = steps
    run = captures.expect_sound(outcome.run)
    assert [(each.revision, each.step) for each in run.revisions] == list(enumerate(steps, 1))
    assert not any("assemble=collective" in notice for notice in run.notices), run.notices
    assert {record.revision for record in run.records if s2 <= record.step < s3} == {2}
    expect_records(run, how, "layers.0.mlp", "forward", [*range(s1, s3), *range(s6, s7)])
    expect_records(run, how, "layers.1.mlp.down.weight", "param", range(s1, s4))
    expect_records(run, how, "layers.1.mlp", "forward", range(s2, s5))
    edited = range(s2, s3)
    for module, kind, steps in [
        ("layers.1.mlp.down.weight", "grad", range(s1, s4)),
        ("lm_head", "backward_pre", range(s1, s3)),
    ]:
        records = [record for record in run[module] if record.kind == kind]
        assert [record.step for record in records] == list(steps)
        wholes = expected(how)[module, kind]
        for record in records:
            of_job = record.dp_size if kind.startswith("backward") else 1
            same = captures.close(record.tensor() / of_job, wholes[record.step % live.BATCHES])
            assert same == (record.step not in edited), (module, kind, record.step)
    # Nothing but the edit changes what the job computes, down to the last bit.
    for step, loss in enumerate(outcome.losses):
        assert (loss == outcome.losses[step % live.BATCHES]) == (step not in edited), step


@pytest.mark.parametrize("how", ["parts", "by_hand", "in_turn", "in_backward"])
def test_whatever_ends_a_step_all_of_the_next_has_the_hooks_that_it_began_with(how, tmp_path):
    with session(how, tmp_path) as job:
        first = job.change("add", "layers.0.mlp; lm_head; layers.1.mlp.down.weight:grad; lm_head.weight:grad")
        job.reach(first["step"] + 6)
        second = job.change("remove", "2")
        job.reach(second["step"] + 6)
        last = job.change("set", "layers.1.mlp")
        job.reach(last["step"] + 6)
        outcome = job.stop().expect(0)
    run = captures.expect_sound(outcome.run)
    begin, middle, end = (answer["step"] for answer in (first, second, last))
    expect_records(run, how, "layers.0.mlp", "forward", range(begin, end))
    expect_records(run, how, "lm_head", "forward", range(begin, middle))
    expect_records(run, how, "layers.1.mlp", "forward", range(end, len(outcome.losses)))
    if how in ("in_turn", "in_backward"):
        for name in ("layers.1.mlp.down.weight", "lm_head.weight"):
            expect_records(run, how, name, "grad", range(begin, end))
    for step, loss in enumerate(outcome.losses):
        assert loss == outcome.losses[step % live.BATCHES], step


def test_where_parts_are_called_hooks_go_from_one_to_another(tmp_path):
    with session("parts", tmp_path, "layers.0.mlp") as job:
        answers = []
        for words in (["add", "embed"], ["set", "lm_head"], ["set", "norm"]):
            answers.append(job.change(*words)["step"])
            job.reach(answers[-1] + 4)
        outcome = job.stop().expect(0)
    run = captures.expect_sound(outcome.run)
    first, second, last = answers
    expect_records(run, "parts", "layers.0.mlp", "forward", range(second))
    expect_records(run, "parts", "embed", "forward", range(first, second))
    expect_records(run, "parts", "lm_head", "forward", range(second, last))
    expect_records(run, "parts", "norm", "forward", range(last, len(outcome.losses)))


def test_all_stages_of_a_rank_begin_with_a_batch(tmp_path):
    with session("looped", tmp_path) as job:
        for words in (["add", "layers.0.mlp"], ["set", "layers.*.mlp"], ["set", "layers.2.mlp"]):
            revision = job.change(*words)["revision"]
            job.reach_revision(revision)
            job.reach(job.steps() + 4)
        outcome = job.stop().expect(0)
    run = captures.expect_sound(outcome.run)
    steps = {layer: [record.step for record in run[f"layers.{layer}.mlp"]] for layer in range(pipeline.LAYERS)}
    assert steps[1] == steps[3] and steps[1] == list(range(steps[1][0], steps[1][-1] + 1))
    assert steps[0][-1] == steps[1][-1] and steps[2][0] == steps[1][0] and steps[0][0] < steps[1][0]
    assert all(record.complete for record in run.records)


@pytest.mark.parametrize("how", ["inference", "served", "apart"])
def test_without_an_optimizer_hooks_begin_with_a_pass(how, tmp_path):
    with session(how, tmp_path) as job:
        added = job.change("add", "layers.0.mlp")
        job.reach_revision(1)
        here = job.steps()
        job.reach(here + 8)
        removed = job.change("set", "lm_head")
        job.reach_revision(2)
        job.reach(job.steps() + 8)
        outcome = job.stop().expect(0)
    run = captures.expect_sound(outcome.run)
    if how != "apart":
        expect_records(run, how, "layers.0.mlp", "forward", range(added["step"], removed["step"]))
    else:
        assert (added["step"], removed["step"]) == (None, None)
        for rank in (0, 1):
            steps = [record.step for record in run["layers.0.mlp"] if rank in record.ranks]
            assert steps == list(range(steps[0], steps[-1] + 1)) and len(steps) >= 8
            after = [record.step for record in run["lm_head"] if rank in record.ranks]
            assert after[0] == steps[-1] + 1


def test_a_job_that_was_started_with_hooks_changes_them_too(tmp_path):
    with session("fsdp2", tmp_path, "layers.0.mlp@every=2; layers.*.mlp.up") as job:
        told = job.ask().out
        assert "revision 0" in told and "layers.0.mlp@every=2" in told
        line = job.ask("remove", "2").out
        assert line.startswith("revision 1 from step ") and line.rstrip().endswith(", 2 ranks")
        step = job.change()["pending"]
        begins = int(line.split()[4])
        assert step in (None, {"revision": 1, "step": begins})
        job.reach(begins + 4)
        outcome = job.stop().expect(0)
    run = captures.expect_sound(outcome.run)
    assert [record.step for record in run["layers.1.mlp.up"]] == list(range(begins))
    assert {record.step % 2 for record in run["layers.0.mlp"]} == {0}
    assert max(record.step for record in run["layers.0.mlp"]) > begins


def refused(job: Session, *words: str, code: int = 1) -> str:
    """The one line with which a command is refused."""
    outcome = job.ask(*words, code=code)
    assert outcome.out == "" and len(outcome.err.splitlines()) == 1, outcome.text
    return outcome.err


def test_what_cannot_be_is_refused_with_a_reason_and_changes_nothing(tmp_path):
    with session("ddp", tmp_path, "layers.0.mlp") as job:
        assert "forward" in refused(job, "add", "layers.*.mlp:forwrd", code=2)
        assert "hooks.toml" in refused(job, "add", "hooks.toml", code=2)
        assert "Python edits" in refused(job, "add", "lm_head|edits.py:f", code=2)
        assert "no clause has the id 7" in refused(job, "remove", "7", code=2)
        # A rank that is stopped, and the job with it: nobody waits, and nothing is changed.
        rank = next(pid for pid in job.job.pids() if rank_of(pid) == "1")
        os.kill(rank, signal.SIGSTOP)
        assert "rank 1 does not answer" in refused(job, "add", "lm_head")
        os.kill(rank, signal.SIGCONT)
        assert job.change()["revision"] == 0
        now = job.change("add", "lm_head")
        job.reach(now["step"] + 2)
        outcome = job.stop().expect(0)
    run = captures.expect_sound(outcome.run)
    assert min(record.step for record in run["lm_head"]) == now["step"]
    assert "the run is over" in refused(job, "add", "norm")


def rank_of(pid: int) -> str | None:
    """The rank that a process was given, if it runs the program."""
    process = pathlib.Path("/proc") / str(pid)
    command = (process / "cmdline").read_bytes().split(b"\0")
    names = dict(each.split(b"=", 1) for each in (process / "environ").read_bytes().split(b"\0") if b"=" in each)
    if not any(word.endswith(b"live.py") for word in command[:3]):
        return None
    return names.get(b"RANK", b"").decode() or None


def test_an_agent_that_is_killed_leaves_one_answer_and_the_next_goes_on(tmp_path):
    """A decision that waits for its step begins, whoever is gone; ids and revisions are not given again."""
    out, stop, socket = tmp_path / "run", tmp_path / "stop", tmp_path / "s"
    env = harness.preloaded("", socket)
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(harness.agent(out, socket))
        job = stack.enter_context(harness.Job(harness.on_ranks("live.py", "ddp", str(stop)), env))
        each = Session(job, out, stop)
        each.reach(2)
        added = each.change("add", "layers.0.mlp; lm_head")
        first.process.kill()
        first.process.wait()
        assert "the run is over" in refused(each, "add", "norm")
        each.reach(added["step"] + 3)
        stack.enter_context(harness.agent(out, socket))
        harness.wait_until(each.answers, "the next agent", job=job)
        now = each.change()
        assert (now["revision"], [clause["id"] for clause in now["clauses"]]) == (1, [1, 2])
        removed = each.change("remove", "2")
        last = each.change("add", "norm")
        each.reach(last["step"] + 2)
        assert (removed["revision"], last["revision"]) == (2, 3)
        assert [clause["id"] for clause in each.change()["clauses"]] == [1, 3]
        outcome = each.stop().expect(0)
    run = flexmodel.open(outcome.run)
    assert [revision.revision for revision in run.revisions] == [1, 2, 3]
    steps = [record.step for record in run["lm_head"]]
    assert max(steps) == removed["step"] - 1 and min(record.step for record in run["norm"]) == last["step"]


def test_ranks_that_are_started_again_begin_with_the_hooks_in_force(tmp_path):
    launcher = ["torchrun", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    with session("ddp", tmp_path, launcher=launcher, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1") as job:
        first = job.change("add", "layers.0.mlp; lm_head")
        job.reach(first["step"] + 4)
        pathlib.Path(f"{tmp_path / 'stop'}-rank").touch()
        harness.wait_until(lambda: job.job.out.count("step 3 ") == 2, "the second attempt", job=job.job)
        now = job.change()
        assert (now["revision"], [clause["id"] for clause in now["clauses"]]) == (1, [1, 2])
        removed = job.change("remove", "2")
        job.reach_revision(2)
        outcome = job.stop().expect(0)
    run = captures.expect_sound(outcome.run)
    told = [(each.attempt, each.revision, each.step) for each in run.revisions]
    assert told == [(0, 1, first["step"]), (1, 1, 0), (1, 2, removed["step"])]
    steps = [record.step for record in run["lm_head"] if record.attempt == 1]
    assert steps == list(range(removed["step"]))


def test_a_thousand_changes_leave_nothing_in_the_job(tmp_path):
    """Of ranks that make passes of their own, each of which begins with what is in force: nothing is a step ahead."""
    with session("apart", tmp_path) as job:
        pids = [pid for pid in job.job.pids() if rank_of(pid) is not None]
        lock = json.loads((job.out / "agent.lock").read_text())
        connection = http.client.HTTPConnection("127.0.0.1", lock["port"], timeout=harness.TIMEOUT)
        seen = []
        for number in range(CHANGES):
            clauses = SOAK[number % len(SOAK)]
            answer = posted(connection, lock["token"], {"op": "set", "clauses": clauses})
            while "error" in answer:
                # The last one has not begun on every rank.
                assert "try again" in answer["error"], answer
                answer = posted(connection, lock["token"], {"op": "set", "clauses": clauses})
            assert answer["revision"] > number
            if number in (CHANGES // 2, CHANGES - 1):
                seen.append([left_in(pid) for pid in pids])
        outcome = job.stop().expect(0)
    assert outcome.run is not None and len(flexmodel.open(outcome.run).revisions) == CHANGES
    for before, after in zip(*seen, strict=True):
        assert after.descriptors <= before.descriptors and after.threads <= before.threads, (before, after)
        assert after.maps <= before.maps + 4 and after.memory <= before.memory + (4 << 20), (before, after)


CHANGES = 1000
SOAK = ["layers.*.mlp", "layers.*.mlp.up:forward,forward_pre; lm_head", "class=Linear:backward|scale(0.5)", "norm"]


class Left(NamedTuple):
    """What a process has."""

    descriptors: int
    threads: int
    maps: int
    memory: int


def left_in(pid: int) -> Left:
    process = pathlib.Path("/proc") / str(pid)
    status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
    maps = len((process / "maps").read_text().splitlines())
    memory = int(status["RssAnon"].split()[0]) << 10
    return Left(len(list((process / "fd").iterdir())), int(status["Threads"]), maps, memory)


def posted(connection: http.client.HTTPConnection, token: str, change: dict[str, Any]) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    connection.request("POST", "/api/hooks", json.dumps(change), headers)
    return json.loads(connection.getresponse().read())
