"""The agent comes late, dies, stops, fills its disk, falls behind: the job never notices more than lost captures."""

import contextlib
import pathlib
import re
import signal
import subprocess

import flexmodel
import pytest
import torch
import wide

import captures
import harness
import reference_runs

HOOKS = "layers.*.mlp:forward,backward"


class Training:
    """until.py under the preload, by hand."""

    def __init__(self, folder: pathlib.Path, hooks: str = HOOKS, width: int = 32, **env: str):
        self.stop = folder / "stop"
        self.socket = folder / "agent.sock"
        self.job = harness.Job(
            harness.python("until.py", str(self.stop), str(width)), harness.preloaded(hooks, self.socket, **env)
        )

    @property
    def step(self) -> int:
        """The last step that was printed."""
        lines = [line for line in self.job.out.splitlines() if line.startswith("step ")]
        return int(lines[-1].split()[1]) if lines else -1

    def go_on(self, steps: int = 5) -> None:
        """Returns after that many more steps."""
        goal = self.step + steps
        harness.wait_until(lambda: self.step >= goal, f"step {goal}", job=self.job)

    def finish(self) -> harness.Outcome:
        """Lets it end by itself."""
        self.stop.touch()
        return self.job.wait().expect(0)


@pytest.fixture
def training(tmp_path):
    with contextlib.ExitStack() as stack:

        def start(**options) -> Training:
            made = Training(tmp_path, **options)
            stack.enter_context(made.job)
            return made

        yield start


def _steps(out: pathlib.Path) -> set[int]:
    try:
        return {record.step for record in flexmodel.open(out).records}
    except flexmodel.RunError:
        return set()


def _wait_for_records(out: pathlib.Path, beyond: int = -1) -> None:
    harness.wait_until(lambda: out.exists() and max(_steps(out), default=-1) > beyond, f"a record beyond step {beyond}")


def test_an_agent_that_comes_late_gets_what_waits_in_the_slab_and_the_rest(training, tmp_path):
    job = training()
    job.go_on(3)
    with harness.agent(tmp_path / "x", job.socket):
        _wait_for_records(tmp_path / "x")
        job.go_on(3)
        outcome = job.finish()
    assert _steps(tmp_path / "x") == set(range(len(outcome.losses)))
    assert outcome.losses == reference_runs.until(len(outcome.losses))


def _captured(out: pathlib.Path) -> int:
    """Bytes of tensors in the run's files."""
    return sum(max(f.stat().st_size - (1 << 20), 0) for f in out.glob("shard-*"))


def _records_exist(out: pathlib.Path) -> bool:
    return max(_steps(out), default=-1) > 2


KILLS = {
    "at-once": [(32, lambda out: out.is_dir())],
    "at-the-first-bytes": [(32, lambda out: _captured(out) > 0)],
    "between-steps": [(32, _records_exist)],
    # A step has 6 MB; the slab is always full.
    "in-a-burst": [(1024, lambda out: _captured(out) > 20 << 20)],
    "again-and-again": [(256, lambda out, more=more: _captured(out) > more << 20) for more in (1, 4, 5, 12)],
}


@pytest.mark.parametrize("moment", KILLS)
def test_a_killed_agent_loses_nothing_journalled_and_its_successor_goes_on(moment, training, tmp_path):
    """STORE-4."""
    out = tmp_path / "x"
    width, _ = KILLS[moment][0]
    job = training(width=width, FLEXMODEL_SLAB="1M")
    before: dict[str, torch.Tensor] = {}
    for _, reached in KILLS[moment]:
        with harness.agent(out, job.socket) as agent:
            harness.wait_until(lambda reached=reached: reached(out), moment, job=job.job)
            agent.process.kill()
            agent.process.wait()
        job.socket.unlink()
        # The last thing that an agent makes before it takes anything.
        if (out / "run.json").exists():
            harness.run([harness.FLEXMODEL, "verify", str(out)]).expect(0)
            before |= {str(record): record.tensor() for record in _complete(out)}
    assert before or moment in ("at-once", "at-the-first-bytes")
    job.go_on(5)
    with harness.agent(out, job.socket):
        _wait_for_records(out, beyond=job.step)
        outcome = job.finish()
    harness.run([harness.FLEXMODEL, "verify", str(out)]).expect(0)
    after = {str(record): record for record in _complete(out)}
    for name, value in before.items():
        assert captures.same_bytes(after[name].tensor(), value), name
    assert all(record.tensor().shape == record.shape for record in after.values())
    kills = len(KILLS[moment])
    assert outcome.err.count("flexmodel:") <= 1 + 2 * kills, outcome.err  # gone, back: said once each
    assert outcome.losses == reference_runs.until(len(outcome.losses), width)


def test_a_stopped_agent_does_not_stop_the_job(training, tmp_path):
    """WAIT-1."""
    # Wide outputs and a small slab: the slab is full at once.
    job = training(width=256, FLEXMODEL_SLAB="1M")
    with harness.agent(tmp_path / "x", job.socket) as agent:
        _wait_for_records(tmp_path / "x")
        agent.process.send_signal(signal.SIGSTOP)
        job.go_on(60)
        agent.process.send_signal(signal.SIGCONT)
        _wait_for_records(tmp_path / "x", beyond=job.step)
        job.finish()
    harness.run([harness.FLEXMODEL, "verify", str(tmp_path / "x")]).expect(0)
    assert flexmodel.open(tmp_path / "x").info.totals.dropped > 0


def test_a_job_that_is_killed_leaves_a_readable_run(training, tmp_path):
    out = tmp_path / "x"
    job = training()
    with harness.agent(out, job.socket):
        _wait_for_records(out, beyond=2)
        job.job.process.kill()
        job.job.process.wait()
    harness.run([harness.FLEXMODEL, "verify", str(out)]).expect(0)
    assert {0, 1, 2} <= _steps(out)


STEPS, ROWS = 4, 1024
"""wide.py: outputs of 4 MiB, four times the smallest slab."""


def _wide_loss(model: torch.nn.Module, step: int, _sizes: list[int], rank: int) -> torch.Tensor:
    return model(wide.batch(step, ROWS, rank)).square().mean()


def _wide_parts() -> list[torch.Tensor]:
    model = wide.build()
    with torch.no_grad():
        return [model[0](wide.batch(0, ROWS, rank)) for rank in range(2)]


def test_waiting_loses_nothing_through_a_slab_smaller_than_the_tensor(run_once):
    argv = harness.on_ranks("wide.py", str(STEPS), str(ROWS))
    outcome = run_once(argv, "*:forward,backward_pre", "--on-full", "wait", FLEXMODEL_SLAB="1M").expect(0)
    run = captures.expect_sound(outcome.run)
    assert len(run.records) == 4 * 2 * STEPS
    assert all(record.complete and record.shape == (2 * ROWS, 1024) for record in run.records)
    assert captures.same_bytes(run.get("0", step=0), torch.cat(_wide_parts()))
    expected, _ = reference_runs.data_parallel(wide.build(), bool, steps=STEPS, loss_of=_wide_loss)
    kinds = ("forward", "backward_pre")
    captures.expect_equal(captures.read(outcome.run), {k: v for k, v in expected.items() if k.kind in kinds})


def test_dropping_counts_what_it_drops(run_once):
    argv = harness.on_ranks("wide.py", str(STEPS), str(ROWS))
    outcome = run_once(argv, "*:forward,backward_pre", "--on-full", "drop", FLEXMODEL_SLAB="1M").expect(0)
    harness.run([harness.FLEXMODEL, "verify", str(outcome.run)]).expect(0)
    totals = flexmodel.open(outcome.run).info.totals
    assert totals.dropped > 0
    assert totals.parts + totals.dropped == 2 * 4 * 2 * STEPS  # ranks, modules, kinds, steps


def test_the_agents_memory_is_bounded(tmp_path):
    """The slabs, and 64 MiB beside, however much goes through."""
    out, socket = tmp_path / "x", tmp_path / "agent.sock"
    with harness.agent(out, socket) as agent:
        env = harness.preloaded("*:forward,backward_pre", socket, FLEXMODEL_SLAB="1M")
        harness.run(harness.on_ranks("wide.py", "10", str(ROWS)), env).expect(0)
        harness.wait_until(lambda: len(_complete(out)) == 4 * 2 * 10, "every record")
        peak = _peak_memory(agent.process.pid)
    assert sum(f.stat().st_size for f in out.iterdir()) > 600 << 20
    assert peak < (64 + 2 * 1) << 20, f"{peak >> 20} MiB"


def test_the_jobs_memory_is_bounded(tmp_path):
    """One slab, and little beside, however much goes through; ARCHITECTURE.md, Bounds."""
    argv = harness.python("footprint.py", "60")
    hooks = "*:forward_pre,forward,backward,backward_pre"
    outcome = harness.tapped(argv, hooks, tmp_path / "x", "--on-full", "wait", FLEXMODEL_SLAB="1M").expect(0)
    assert sum(f.stat().st_size for f in (tmp_path / "x").iterdir()) > 400 << 20
    own, shared = _printed_memory(outcome)
    untapped, _ = _printed_memory(harness.run(argv).expect(0))
    assert shared < 2 << 20, f"{shared >> 10} KiB of shared memory"
    assert own - untapped < 12 << 20, f"{own >> 20} MiB of its own, {untapped >> 20} MiB untapped"


def _printed_memory(outcome: harness.Outcome) -> list[int]:
    found = re.search(r"^memory (\d+) shared (\d+)$", outcome.out, re.M)
    return [int(number) << 10 for number in found.groups()]


def _complete(out: pathlib.Path) -> list:
    return [record for record in flexmodel.open(out).records if record.complete]


def _peak_memory(pid: int) -> int:
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) << 10


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 100 MiB, less than half of what the job captures."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", str(folder)]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_is_said_once_counted_and_survived(small_disk, untapped_once):
    """STORE-3."""
    argv = harness.on_ranks("wide.py", str(STEPS), str(ROWS))
    outcome = harness.tapped(argv, "*:forward,backward_pre", small_disk / "x").expect(0)
    assert outcome.losses == untapped_once(argv).losses
    assert outcome.err.count("No space left on device") == 1, outcome.text
    run = flexmodel.open(small_disk / "x")
    assert run.info.finished_ns is not None and run.info.exit_code == 0
    complete = [record for record in run.records if record.complete]
    assert complete
    stored = sum(len(record.parts) for record in run.records)
    dropped = int(re.search(r"(\d+) dropped", outcome.err)[1])
    assert dropped > 0
    assert stored + dropped == 2 * 4 * 2 * STEPS
    assert captures.same_bytes(run.get("0", step=0), torch.cat(_wide_parts()))
