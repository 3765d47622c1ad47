"""The command line of scripts/gpu-check, whose head says what there is to say."""

from __future__ import annotations

import argparse
import ctypes
import os
import pathlib
import sys

from . import payload, report, runner, stages
from .setting import Setting


def main() -> int:
    """Runs what was asked for; the exit code."""
    parser = argparse.ArgumentParser(prog="gpu-check", description="Checks taps on a GPU, stage by stage.")
    parser.add_argument("stages", nargs="*", metavar="STAGE", help="all, if none is named")
    parser.add_argument("--dry-run", action="store_true", help="every stage on the CPU")
    parser.add_argument("--prefix", required=True, type=pathlib.Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=pathlib.Path, default=os.environ.get("OUT", "gpu-check.out"))
    parser.add_argument("--within", type=float, default=float("inf"), help="seconds for all of it")
    parser.add_argument("--list", action="store_true", help="say what there is")
    parser.add_argument("--pack", type=pathlib.Path, metavar="FILE", help="pack what another machine needs")
    asked = parser.parse_args()
    if asked.list:
        for stage in stages.ALL:
            print(f"{stage.name:<16} {stage.bound:>4} s  {stage.about}")
        return 0
    if asked.pack:
        return payload.pack(asked.prefix, asked.pack)
    unknown = set(asked.stages) - {stage.name for stage in stages.ALL}
    if unknown:
        parser.error(f"no stage is called {', '.join(sorted(unknown))}; --list says which there are")
    chosen = [stage for stage in stages.ALL if not asked.stages or stage.name in asked.stages]
    if not asked.dry_run and not _has_driver():
        parser.error("no CUDA driver is here (libcuda.so.1); --dry-run goes through every stage without one")
    setting = Setting(asked.prefix.resolve(), "cpu" if asked.dry_run else "cuda")
    asked.out.mkdir(parents=True, exist_ok=True)
    with report.Report(asked.out) as saying:
        runner.run(chosen, setting, saying, asked.within)
    return int(any(ended.status not in report.GOOD for ended in saying.stages))


def _has_driver() -> bool:
    """Looks for it and asks it nothing: a process that has can fork none that uses a GPU."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
