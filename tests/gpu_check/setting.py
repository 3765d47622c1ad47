"""What a stage has: the device, FlexModel, a folder; and what it says: facts, and what is not as it has to be."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Sequence

import flexmodel

from harness import LAUNCHER, PROGRAMS, Outcome


@dataclasses.dataclass(frozen=True)
class Setting:
    """One stage's own. A dry run is one on the CPU."""

    prefix: pathlib.Path
    """Has bin/flexmodel and lib/flexmodel."""
    device: str
    work: pathlib.Path = pathlib.Path()
    """A folder of the stage's, which is removed after it."""

    @property
    def on_gpu(self) -> bool:
        """Whether there is a device; not so in a dry run."""
        return self.device == "cuda"

    @property
    def flexmodel(self) -> str:
        """The command."""
        return str(self.prefix / "bin" / "flexmodel")

    def expect(self, holds: bool, what: str) -> None:
        """Notes a failure, unless it holds; what comes behind is looked at all the same."""
        if not holds:
            self.failed(what)

    def expect_on_gpu(self, holds: bool, what: str) -> None:
        """The same of what only a GPU can tell, `what` being what has to hold. A dry run says so."""
        if self.on_gpu:
            self.expect(holds, f"not so: {what}")
        else:
            self.needs_gpu(what)

    def failed(self, what: str) -> None:
        """This is not as it has to be."""
        self._note("failure", what)

    def needs_gpu(self, what: str) -> None:
        """This cannot be told here."""
        self._note("gpu", what)

    def fact(self, name: str, value: object) -> None:
        """Something that was seen, for results.json."""
        print(f"{name}: {value}", flush=True)
        self._note("fact", name, value)

    def _note(self, *what: object) -> None:
        with open(self.work / "notes", "a") as notes:
            notes.write(json.dumps(what) + "\n")

    def noted(self) -> list[list]:
        """All that was noted."""
        path = self.work / "notes"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def program(self, name: str, *arguments: object) -> list[str]:
        """One process of a program in tests/programs; the device is its last argument."""
        return [sys.executable, str(PROGRAMS / name), *map(str, arguments), self.device]

    def on_ranks(self, count: int, name: str, *arguments: object) -> list[str]:
        """The same on several ranks. torchrun would look up the machine's name, minutes where there is no network."""
        python, *program = self.program(name, *arguments)
        return [python, LAUNCHER, str(count), *program]

    def tapped(self, name: str, hooks: str, argv: Sequence[str], *options: str, **env: str) -> Outcome:
        """`argv` under `flexmodel run`; see `job`."""
        out = self.work / name
        ours = [self.flexmodel, "run", "--hooks", hooks, "--out", str(out), *options, "--"]
        return self.job([*ours, *argv], out, **env)

    def job(
        self, argv: Sequence[str], out: pathlib.Path = pathlib.Path(), may_fail: bool = False, **env: str
    ) -> Outcome:
        """Runs `argv` to its end; one that fails is a failure, unless it may. Its stderr is printed."""
        files = self.work / "out", self.work / "err"
        with open(files[0], "w") as stdout, open(files[1], "w") as stderr:
            code = subprocess.run(
                argv, env=self.environment(**env), stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, check=False
            ).returncode
        text, errors = (file.read_text(errors="replace") for file in files)
        print(errors[-6000:], end="", flush=True)
        if code and not may_fail:
            self.failed(f"{' '.join(argv)} ended with {code}")
        return Outcome(code, text, errors, out)

    def command(self, *argv: str) -> str:
        """What a command prints, its stderr last; nothing, where it is missing or takes a minute."""
        try:
            done = subprocess.run(argv, env=self.environment(), capture_output=True, text=True, check=False, timeout=60)
        except (OSError, subprocess.TimeoutExpired) as error:
            print(f"{argv[0]}: {error}", flush=True)
            return ""
        return done.stdout + done.stderr

    def environment(self, **extra: str) -> dict[str, str]:
        """A job's environment: this one, where FlexModel is, and nothing else of FlexModel's."""
        kept = ("FLEXMODEL_HOME", "FLEXMODEL_BRIDGE_CACHE")
        env = {k: v for k, v in os.environ.items() if k in kept or not k.startswith("FLEXMODEL_")}
        env.pop("LD_PRELOAD", None)
        env.pop("PYTHONPATH", None)
        ours = {
            "PYTHONFAULTHANDLER": "1",
            "PYTHONUNBUFFERED": "1",
        }
        return env | ours | extra

    def sound(self, run: pathlib.Path) -> flexmodel.Run:
        """The run, which `flexmodel verify` passes, in which nothing was dropped, and to which nothing was said."""
        verified = subprocess.run([self.flexmodel, "verify", str(run)], capture_output=True, text=True, check=False)
        self.expect(verified.returncode == 0, f"flexmodel verify: {(verified.stdout + verified.stderr)[-1000:]}")
        opened = flexmodel.open(run)
        self.expect(opened.info.totals.dropped == 0, f"{opened.info.totals.dropped} tensors were dropped")
        self.expect(not opened.problems, f"problems: {opened.problems}")
        self.expect(not opened.notices, f"notices: {opened.notices}")
        return opened
