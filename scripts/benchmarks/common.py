"""What the benchmarks share: how numbers are printed, jobs that take turns, and a place for run directories.

Everything here compares two things in one run, taking turns, and prints their ratio with its spread. Nothing asserts.
"""

import contextlib
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, Listener

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
FLEXMODEL = pathlib.Path(shutil.which("flexmodel") or sys.exit("bench: flexmodel is not on PATH; use scripts/bench"))
EXAMPLES = ROOT / "target" / "release" / "examples"
LIBRARY = FLEXMODEL.resolve().parent.parent / "lib" / "flexmodel" / "libflexmodel.so"


def row(name: str, samples: Sequence[float], goal: str = "", form: str = "{:.3f}") -> None:
    """One line: the median, the middle half and the whole range of `samples`."""
    s = sorted(samples)
    low, _, high = statistics.quantiles(s, n=4) if len(s) > 1 else (s[0],) * 3
    show = form.format
    spread = f"middle half {show(low)} .. {show(high)}, all {show(s[0])} .. {show(s[-1])}, n={len(s)}"
    if len(s) == 1:
        spread = ""
    print(f"  {name:<46} {show(statistics.median(s)):>9}   {spread}{'   goal ' + goal if goal else ''}", flush=True)


def title(text: str) -> None:
    """What the rows below are about."""
    print(f"\n{text}", flush=True)


@contextlib.contextmanager
def scratch() -> Iterator[pathlib.Path]:
    """A folder on the checkout's own disk, gone afterwards."""
    parent = ROOT / "target" / "bench"
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent) as path:
        yield pathlib.Path(path)


def environment(**extra: str) -> dict[str, str]:
    """A job's environment without FlexModel, one thread a process."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("FLEXMODEL_") and k != "LD_PRELOAD"}
    return env | {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"} | extra


def preload(hooks: str, socket: pathlib.Path | str = "/nonexistent/agent.sock") -> dict[str, str]:
    """What taps a job without `flexmodel run`."""
    return {"LD_PRELOAD": str(LIBRARY), "FLEXMODEL_HOOKS": hooks, "FLEXMODEL_AGENT": f"unix:{socket}"}


class Worker:
    """A program that runs rounds when it is told to. `argv` gets the address at its end; see `answer`."""

    def __init__(self, argv: Sequence[str], env: dict[str, str]) -> None:
        self._dir = tempfile.mkdtemp(prefix="flexmodel-bench-")
        self._listener = Listener(f"{self._dir}/s")
        self._process = subprocess.Popen([*argv, f"{self._dir}/s"], env=env, stdin=subprocess.DEVNULL)
        self._connection: Connection | None = None

    def ready(self) -> None:
        """Returns once the program waits for its first round."""
        self._listener._listener._socket.settimeout(300)
        self._connection = self._listener.accept()

    def round(self, what: object) -> object:
        """What the program answers to `what`."""
        assert self._connection is not None
        self._connection.send(what)
        return self._connection.recv()

    def end(self) -> None:
        """Lets the program end."""
        assert self._connection is not None
        self._connection.send(None)
        self._process.wait(60)
        self._listener.close()
        shutil.rmtree(self._dir, ignore_errors=True)


def take_turns(a: Worker, b: Worker, what: object, rounds: int) -> list[tuple[object, object]]:
    """Rounds of both, each second pair in the other order."""
    pairs = []
    for n in range(rounds):
        if n % 2 == 0:
            first = a.round(what)
            pairs.append((first, b.round(what)))
        else:
            second = b.round(what)
            pairs.append((a.round(what), second))
    return pairs


def cpu_seconds(parent: int) -> float:
    """CPU seconds so far of the agent that `flexmodel run` with this process id started; 0 if there is none."""
    for entry in pathlib.Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            if int(fields[1]) == parent and b"\0agent\0" in (entry / "cmdline").read_bytes():
                return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0
