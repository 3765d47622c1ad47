"""Runs stages, each in a process of its own that is ended at its bound. None stops the rest."""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import os
import pathlib
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence

from .report import Ended, Report
from .setting import Setting

PATIENCE = 3.0
"""Seconds that a process over its bound has to print where it stands, and then to end."""

BUSY = 4
"""How many times as long a stage may take in a dry run, beside other tests."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """A check that has an answer of its own."""

    name: str
    bound: int
    """Seconds, on a machine whose disk is cold: several times what it takes."""
    check: Callable[[Setting], None]
    about: str


def run(chosen: Sequence[Stage], setting: Setting, report: Report, within: float = float("inf")) -> None:
    """One after the other, as they measure; all of them `within` this number of seconds."""
    end = time.monotonic() + within
    for stage in chosen:
        bound = min(stage.bound * (1 if setting.on_gpu else BUSY), end - time.monotonic())
        if bound < 1:
            report.end(Ended(stage.name, "left out", 0.0), "")
            continue
        report.begin(stage.name, bound)
        with tempfile.TemporaryDirectory(prefix="gpu-check-", ignore_cleanup_errors=True) as folder:
            ended, output = _run(stage, dataclasses.replace(setting, work=pathlib.Path(folder)), bound)
        report.end(ended, output)


def _run(stage: Stage, setting: Setting, bound: float) -> tuple[Ended, str]:
    """A forked process has torch already, and no context on a device: this one makes none."""
    log, begin = setting.work / "log", time.monotonic()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        _be(stage, setting, log)
    status = _wait(child, bound)
    if status is None:
        _end_all(child, signal.SIGABRT)
        _wait(child, PATIENCE)
    _end_all(child, signal.SIGKILL)  # also what a stage that ended has left behind
    if status is None:
        _wait(child, PATIENCE)  # it may not end, where a driver does not let it
    ended = Ended(stage.name, "ok", round(time.monotonic() - begin, 1))
    for kind, *rest in setting.noted():
        match kind:
            case "fact":
                ended.facts[rest[0]] = rest[1]
            case "failure":
                ended.failures.append(rest[0])
            case "gpu":
                ended.needs_gpu.append(rest[0])
    if status is None:
        ended.status = "over its bound"
    elif status or ended.failures:
        ended.status = "FAILED"
    return ended, log.read_text(errors="replace") if log.exists() else ""


def _be(stage: Stage, setting: Setting, log: pathlib.Path) -> None:
    """The process of a stage. Does not return."""
    code = 1
    try:
        os.setsid()
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        for number in (1, 2):
            os.dup2(file, number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        faulthandler.enable()
        stage.check(setting)
        code = 0
    except BaseException as error:
        traceback.print_exc()
        setting.failed(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(child: int, seconds: float) -> int | None:
    """Its exit code, if it ends by then and nobody has asked for it before."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            ended, status = os.waitpid(child, os.WNOHANG)
        except ChildProcessError:
            return None
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    return None


def _end_all(session: int, number: int) -> None:
    """A signal to all processes of a session. On SIGABRT Python prints its stacks, as its jobs' environment asks."""
    for entry in pathlib.Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):
                if int((entry / "stat").read_text().rpartition(")")[2].split()[3]) == session:
                    os.kill(int(entry.name), number)
