"""What stages come to, for whoever looks on and in two files: the folder may be all that comes back of a machine."""

from __future__ import annotations

import dataclasses
import json
import pathlib

GOOD = ("ok", "left out")
"""How a stage may end in a run that succeeds."""

SHOWN = 40
"""Lines of a stage's output that are printed; log.txt has all."""


@dataclasses.dataclass
class Ended:
    """How a stage ended."""

    name: str
    status: str
    """`ok`, `FAILED`, `over its bound`, or `left out` where no time was left."""
    seconds: float
    facts: dict[str, object] = dataclasses.field(default_factory=dict)
    failures: list[str] = dataclasses.field(default_factory=list)
    needs_gpu: list[str] = dataclasses.field(default_factory=list)
    """What a dry run cannot tell."""


class Report:
    """Prints and writes it as it comes: log.txt has every line, results.json what each stage found."""

    def __init__(self, out: pathlib.Path) -> None:
        self.stages: list[Ended] = []
        self._results = out / "results.json"
        self._log = open(out / "log.txt", "w")  # noqa: SIM115 - closed at the end of the `with`

    def __enter__(self) -> Report:
        return self

    def __exit__(self, *_exc) -> None:
        for ended in self.stages:
            self._say(f"{ended.name:<16} {ended.status:<15} {ended.seconds:6.1f} s")
        total = sum(ended.seconds for ended in self.stages)
        good = sum(ended.status == "ok" for ended in self.stages)
        self._say(f"gpu-check: {good} of {len(self.stages)} stages ok, {total:.0f} s")
        self._log.close()

    def begin(self, name: str, bound: float) -> None:
        """Says which stage runs now."""
        self._say(f"=== {name}, at most {bound:.0f} s")

    def end(self, ended: Ended, output: str) -> None:
        """Says how it went. What was found so far is on disk when this returns."""
        lines = output.splitlines()
        self._log.write("".join(f"{line}\n" for line in lines[:-SHOWN]))
        for line in lines[-SHOWN:]:
            self._say(line[:400])
        for line in ended.needs_gpu:
            self._say(f"needs a GPU: {line}")
        for line in ended.failures:
            self._say(f"FAILED: {line}")
        self._say(f"--- {ended.name}: {ended.status}, {ended.seconds:.1f} s")
        self.stages.append(ended)
        self._results.write_text(json.dumps([dataclasses.asdict(each) for each in self.stages], indent=1) + "\n")

    def _say(self, line: str) -> None:
        print(line, flush=True)
        self._log.write(line + "\n")
        self._log.flush()
