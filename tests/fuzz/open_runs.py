"""Opens hostile run directories from Python: `open_runs.py OPEN_RUN CRASHES SECONDS INPUT...`

OPEN_RUN is the fuzz target of that name. It makes the folders that its inputs describe (`tests/fuzz/tree.rs`): those of
the files and folders INPUT, and for SECONDS seconds those of mutations of them; with 0 seconds, of INPUT alone.
Beside each it writes what the commands find there (`tests/fuzz/answers.rs`). Each folder is opened in a process of its
own that may have 1 GiB of memory and 20 s of CPU time. Whatever ends one of these processes but the reader's documented
errors is a finding, and so is an answer that is not the commands': its input is kept in CRASHES, and the exit code
is 1.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Iterator
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "python-shim"))

import flexmodel
import numpy as np
from flexmodel import _native

MEMORY = 1 << 30
CPU_SECONDS = 20
HANG = 60
"""Seconds without an end, mostly asleep: a named pipe that nobody writes to."""

DOCUMENTED = (flexmodel.RunError, flexmodel.NotCapturedError)
UNKNOWN_TO_NUMPY = (*DOCUMENTED, TypeError)
"""numpy lacks some dtypes."""


def read(folder: pathlib.Path) -> None:
    """Everything that a run is asked for."""
    said = json.loads(folder.with_suffix(".answers").read_text())
    try:
        run = flexmodel.open(folder)
    except DOCUMENTED as error:
        if "\n" in str(error):
            raise AssertionError("an error of more than a line") from error
        if said is not None:
            raise AssertionError("the commands open it") from error
        return
    assert said is not None, "the commands refuse it"
    compare(run, said)
    repr(run), run.modules, run.models, run.notices, run.refused, run.divergences, run.dropped, run.problems
    for record in run.records:
        repr(record), str(record), record.stats, record.parts, record.complete
        with contextlib.suppress(*UNKNOWN_TO_NUMPY):
            record.numpy()
    for module in run:
        with contextlib.suppress(*DOCUMENTED):
            run[module]
        with contextlib.suppress(*UNKNOWN_TO_NUMPY):
            run.get(module, step=0)
    run.refresh()


def compare(run: flexmodel.Run, said: dict[str, Any]) -> None:
    """That a run holds what the commands find in it."""
    problems = run.problems
    assert len(problems) == len(said["problems"]), (problems, said["problems"])
    for problem, place in zip(problems, said["problems"], strict=True):
        assert _native.safe(place) in problem, (problem, place)
    assert run.modules == said["modules"]
    assert [len(run.refused), len(run.divergences), len(run.dropped)] == said["lost"]
    theirs = {json.dumps(one["id"]): one for one in said["records"]}
    assert len(run.records) == len(said["records"]) == len(theirs)
    for record in run.records:
        its_pass = [record.step, record.micro, record.call, record.repeat, record.train]
        identity = json.dumps([
            record.job, record.attempt, record.module, record.kind, record.path, record.model, its_pass,
            record.again, record.apart,
        ])  # fmt: skip
        whole = theirs[identity].pop("whole")
        del theirs[identity]["id"]
        if not theirs[identity]:
            continue  # too much once it is padded
        ours = {
            "what": [record.dtype, record.class_name, record.group, record.parts[0].time_ns],
            "shape": None if record.shape is None else list(record.shape),
            "padded_shape": None if record.padded_shape is None else list(record.padded_shape),
            "ranks": list(record.ranks),
            "dp_size": record.dp_size,
            "count": None if record.stats is None else record.stats.count,
            "parts": [part.crc for part in record.parts],
        }
        assert ours == theirs[identity], (record, ours, theirs[identity])
        if whole == "large":
            continue
        found: str | list[int]
        try:
            # Whatever type it is of: numpy lacks some, and torch takes a second to import.
            memory, _, _ = record._reader.bytes(str(record), None, 1, "left")
            data = np.asarray(memory).tobytes()
            found = [len(data), zlib.adler32(data)]
        except (*DOCUMENTED, TypeError) as error:
            found = type(error).__name__
        assert found == whole, f"{record}: {found}, and by the commands {whole}"


def in_a_process_of_its_own(folder: pathlib.Path) -> str | None:
    """How reading went wrong; None if it did not."""
    log = folder.with_suffix(".log")
    child = os.fork()
    if not child:
        code = 1
        try:
            with open(log, "wb") as file:
                os.dup2(file.fileno(), 2)
            signal.alarm(HANG)
            resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            read(folder)
            code = 0
        except BaseException:
            traceback.print_exc(limit=-8)
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if not status:
        return None
    said = log.read_text(errors="replace").strip()
    end = os.waitstatus_to_exitcode(status)
    if end >= 0:
        return said
    reason = {signal.SIGALRM: "it hangs", signal.SIGXCPU: "too much CPU time", signal.SIGKILL: "too much CPU time"}
    return f"{signal.Signals(-end).name} ({reason.get(-end, 'it crashed')})\n{said}".strip()


def folders(target: pathlib.Path, inputs: list[str], mutations: int) -> Iterator[pathlib.Path]:
    """Folders that the target makes of the inputs, and of so many mutations."""
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="flexmodel-fuzz-") as made:
        kept, found = pathlib.Path(made, "kept"), pathlib.Path(made, "found")
        kept.mkdir(), found.mkdir()
        files = [name for name in inputs if not pathlib.Path(name).is_dir()]
        own = [] if mutations == 0 else [f"-runs={mutations}", str(found)]
        argv = [str(target), "-max_len=16384", "-timeout=60", f"-artifact_prefix={found}/", *own, *(files or inputs)]
        done = subprocess.run(argv, env=os.environ | {"FLEXMODEL_FUZZ_KEEP": str(kept)}, capture_output=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(argv)} failed:\n{done.stderr.decode(errors='replace')[-3000:]}")
        yield from sorted(path for path in kept.iterdir() if path.is_dir())


def main(target: str, crashes: str, seconds: str, *inputs: str) -> int:
    """Opens until the time is over; the exit code."""
    end, opened, findings = time.monotonic() + float(seconds), 0, set()
    while True:
        for folder in folders(pathlib.Path(target), list(inputs), 0 if float(seconds) == 0 else 50 + opened):
            problem = in_a_process_of_its_own(folder)
            opened += 1
            if problem and problem.splitlines()[-1] not in findings:
                findings.add(problem.splitlines()[-1])
                kept = pathlib.Path(crashes, f"open_run_python-{folder.name}")
                shutil.copy(folder.with_suffix(".json"), kept)
                print(f"{problem}\nTest unit written to {kept}", flush=True)
            if float(seconds) and time.monotonic() > end:
                break
        if time.monotonic() > end:
            print(f"Done {opened} runs")
            return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
