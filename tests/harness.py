"""Runs programs as people do, tapped and untapped, and never waits for ever: what hangs shows its stacks and fails."""

import contextlib
import itertools
import json
import os
import pathlib
import resource
import shutil
import signal
import socket as socket_module
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

ROOT = pathlib.Path(__file__).resolve().parent.parent
PROGRAMS = ROOT / "tests" / "programs"
VENV = pathlib.Path(os.environ.get("FLEXMODEL_TEST_VENV", ROOT / ".venv"))
BIN = VENV / "bin"
HOME = VENV / "lib" / "flexmodel"
LAUNCHER = str(ROOT / "tests" / "launcher.py")
LIBRARY = HOME / "libflexmodel.so"
EXTENSIONS = VENV / "torch_extensions"
"""What DeepSpeed compiles at its first use. Who is killed meanwhile leaves a lock there, which others wait for."""
FLEXMODEL = str(BIN / "flexmodel")

TIMEOUT = 150
"""Seconds after which a job counts as hung. Far above what any takes: no test is about durations."""

LONGEST_TEST = 4 * TIMEOUT + 60
"""Seconds after which a test counts as hung, whatever it waits for. One waits for a compiler, four times as long."""

JOBS = os.environ.get("FLEXMODEL_TEST_JOBS")
"""A file that gets a line for each job: what it cost, for whoever makes the tests quicker."""

_TAG = "FLEXMODEL_TEST_JOB"
_numbers = itertools.count()
_running: list["Running"] = []


@dataclass
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str
    run: pathlib.Path | None = None

    @property
    def losses(self) -> list[str]:
        """The losses that the program printed, every bit of them."""
        return [line.split()[3] for line in self.out.splitlines() if line.startswith("step ")]

    def expect(self, code: int = 0) -> "Outcome":
        """Itself if the command ended with `code`."""
        assert self.code == code, f"exit code {self.code}, expected {code}\n{self.text}"
        return self

    @property
    def text(self) -> str:
        """All it wrote, for messages."""
        return f"--- stdout\n{self.out[-6000:]}\n--- stderr\n{self.err[-12000:]}"


def environment(**extra: str | None) -> dict[str, str]:
    """A job's environment: this one without FlexModel, with the checkout's programs first; None removes a name."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("FLEXMODEL_") and k != "LD_PRELOAD"}
    env.pop("PYTHONPATH", None)
    env |= {
        "PATH": f"{BIN}:{env['PATH']}",
        "OMP_NUM_THREADS": "1",
        "PYTHONFAULTHANDLER": "1",
        "DS_ACCELERATOR": "cpu",
        "PYTHONDONTWRITEBYTECODE": "1",
        "TORCH_EXTENSIONS_DIR": str(EXTENSIONS),
    }
    for name, value in extra.items():
        env.pop(name, None) if value is None else env.update({name: value})
    return env


def remove_stale_locks() -> None:
    """At the start, when no job runs that could hold one."""
    for lock in EXTENSIONS.glob("*/lock"):
        lock.unlink()


def python(program: str, *args: str) -> list[str]:
    """One process."""
    return ["python", str(PROGRAMS / program), *args]


def on_ranks(program: str, *args: str, ranks: int = 2) -> list[str]:
    """`ranks` processes on this machine, on a free port, without torchrun's own start; see tests/launcher.py."""
    return ["python", LAUNCHER, str(ranks), str(PROGRAMS / program), *args]


def torchrun(program: str, *args: str, ranks: int = 2) -> list[str]:
    """The same by torchrun itself."""
    return ["torchrun", "--standalone", "--nproc-per-node", str(ranks), str(PROGRAMS / program), *args]


def program_of(argv: Sequence[str]) -> tuple[int | None, list[str]]:
    """The number of ranks, None without any, and the program with its arguments, of what the three above return."""
    match argv:
        case ["torchrun", "--standalone", "--nproc-per-node", count, *rest]:
            return int(count), rest
        case ["python", launcher, count, *rest] if launcher == LAUNCHER:
            return int(count), rest
        case ["python", *rest]:
            return None, rest
    raise ValueError(f"no job of this file's: {argv}")


def run(argv: Sequence[str], env: dict[str, str] | None = None, timeout: float = TIMEOUT, **options) -> Outcome:
    """Runs `argv` to its end. A job that hangs is made to print the Python stacks of all its processes, and fails."""
    with Job(argv, env, **options) as job:
        return job.wait(timeout)


def tapped(
    argv: Sequence[str], hooks: str, out: pathlib.Path, *options: str, timeout: float = TIMEOUT, **env: str
) -> Outcome:
    """Runs `argv` under `flexmodel run`, captures into `out`."""
    command = [FLEXMODEL, "run", "--hooks", hooks, "--out", str(out), *options, "--", *argv]
    outcome = run(command, environment(**env), timeout)
    outcome.run = out
    return outcome


def preloaded(hooks: str, socket: pathlib.Path | str, **extra: str) -> dict[str, str]:
    """The environment that taps a job without `flexmodel run`."""
    return environment(LD_PRELOAD=str(LIBRARY), FLEXMODEL_HOOKS=hooks, FLEXMODEL_AGENT=f"unix:{socket}", **extra)


class Running:
    """A job while it runs. Leaving the `with` ends whatever is left of it."""

    def __init__(self, argv: Sequence[str]):
        self.argv = list(argv)
        self._files = pathlib.Path(tempfile.mkdtemp(prefix="flexmodel-job-"))

    def __enter__(self):
        _running.append(self)
        return self

    def __exit__(self, *_exc) -> None:
        _running.remove(self)
        for pid in self.pids():
            _signal(pid, signal.SIGKILL)
        self._reap()
        shutil.rmtree(self._files, ignore_errors=True)

    def _reap(self) -> None:
        """Returns when the killed processes have ended."""

    @property
    def out(self) -> str:
        """Its stdout so far."""
        return (self._files / "out").read_text(errors="replace")

    @property
    def err(self) -> str:
        """Its stderr so far."""
        return (self._files / "err").read_text(errors="replace")

    def pids(self) -> list[int]:
        """Every live process of it."""
        found = []
        for entry in pathlib.Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    if self._is_mine(entry):
                        found.append(int(entry.name))
        return found

    def _is_mine(self, process: pathlib.Path) -> bool:
        raise NotImplementedError

    def _log(self, cpu: float, wall: float) -> None:
        """CPU is right where no other job of this process ended meanwhile."""
        if JOBS:
            test = os.environ.get("PYTEST_CURRENT_TEST", "").partition(" ")[0]
            line = {"cpu": round(cpu, 2), "wall": round(wall, 2), "test": test, "argv": self.argv}
            with open(JOBS, "a") as log:
                log.write(json.dumps(line) + "\n")


class Job(Running):
    """A running command in a session of its own."""

    def __init__(self, argv: Sequence[str], env: dict[str, str] | None = None, cwd=None, preexec=None):
        super().__init__(argv)
        self.tag = f"{os.getpid()}-{next(_numbers)}-{uuid.uuid4().hex}"
        env = dict(environment() if env is None else env) | {_TAG: self.tag}
        program = shutil.which(self.argv[0], path=env.get("PATH")) or self.argv[0]
        self._began, self._used = time.monotonic(), _used()
        with open(self._files / "out", "wb") as out, open(self._files / "err", "wb") as err:
            self.process = subprocess.Popen(
                [program, *self.argv[1:]], env=env, cwd=cwd, stdin=subprocess.DEVNULL, stdout=out, stderr=err,
                start_new_session=True, preexec_fn=preexec,
            )  # fmt: skip

    def _reap(self) -> None:
        self.process.wait()
        self._log(_used() - self._used, time.monotonic() - self._began)

    def _is_mine(self, process: pathlib.Path) -> bool:
        """Whether it inherited this job's environment."""
        return f"{_TAG}={self.tag}".encode() in (process / "environ").read_bytes().split(b"\0")

    def wait(self, timeout: float = TIMEOUT) -> Outcome:
        """Its outcome, once it has ended."""
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"hung for {timeout} s; stacks follow\n{stacks()}") from None
        return Outcome(code, self.out, self.err)

    def wait_for_line(self, start: str, timeout: float = TIMEOUT) -> None:
        """Returns once a line of stdout starts with `start`."""
        wait_until(lambda: any(line.startswith(start) for line in self.out.splitlines()), f"'{start}'", timeout, self)


def stacks() -> str:
    """Ends every job that runs, and returns what each wrote, the stacks of its processes at the end."""
    for job in _running:
        for pid in job.pids():
            _signal(pid, signal.SIGABRT)  # faulthandler prints the stacks
            _signal(pid, signal.SIGCONT)  # also of those that a test has stopped
    time.sleep(3)
    return "\n".join(f"=== {' '.join(job.argv)}\n{Outcome(-1, job.out, job.err).text}" for job in _running)


@contextlib.contextmanager
def bounded(seconds: int = LONGEST_TEST) -> Iterator[None]:
    """Fails what takes longer, with the stacks of the jobs that run."""

    def hung(_number, _frame) -> None:
        raise AssertionError(f"hung for {seconds} s; stacks follow\n{stacks()}")

    before = signal.signal(signal.SIGALRM, hung)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def wait_until(condition, what: str, timeout: float = TIMEOUT, job: Job | None = None) -> None:
    """Polls until `condition()` holds; a generous bound, for hangs only."""
    deadline = time.monotonic() + timeout
    while not condition():
        if job is not None and job.process.poll() is not None and not condition():
            text = Outcome(job.process.poll(), job.out, job.err).text
            raise AssertionError(f"{what} never came and the job ended\n{text}")
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} never came; stacks follow\n{stacks()}")
        time.sleep(0.05)


@contextlib.contextmanager
def agent(out: pathlib.Path, socket: pathlib.Path, **extra: str) -> Iterator[Job]:
    """A sidecar of its own, ready for jobs."""
    argv = [FLEXMODEL, "agent", "--socket", str(socket), "--out", str(out)]
    with Job(argv, environment(**extra)) as job:
        wait_until(socket.is_socket, "the agent's socket", job=job)
        yield job
        if job.process.poll() is None:
            job.process.terminate()
            job.wait()


def bridge() -> pathlib.Path:
    """The bridge that jobs of this environment use."""
    answer = json.loads(run([FLEXMODEL, "bridge", "list", "--json"]).expect(0).out)
    fitting = [
        b["path"] for b in answer["bridges"] if b["state"] == "current" and b["bridge"]["key"] == answer["wanted"]
    ]
    assert fitting, f"no bridge of this FlexModel for {answer['wanted']} in {answer['cache']}: run scripts/setup"
    return pathlib.Path(fitting[0])


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket_module.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _used() -> float:
    """Seconds of CPU of all processes that this one has waited for, and of those that they did."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)
