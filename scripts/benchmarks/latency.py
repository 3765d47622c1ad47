"""Time from a tap to the record readable by somebody who looks at the run all the time."""

import statistics
import subprocess
import sys
import time

from common import FLEXMODEL, HERE, ROOT, environment, row, scratch, title

STEPS = 500


def main() -> None:
    sys.path.insert(0, str(ROOT / "python-shim"))
    import flexmodel

    title("latency: from the tap (a 1 MiB output) to Run.refresh() with the record in it")
    with scratch() as work:
        out = work / "run"
        program = [sys.executable, HERE / "latency_training.py", STEPS]
        argv = [FLEXMODEL, "run", "--hooks", "0", "--out", out, "--", *program]
        job = subprocess.Popen(list(map(str, argv)), env=environment(), stderr=subprocess.PIPE, text=True)
        while not (out / "run.json").exists() and job.poll() is None:
            time.sleep(0.01)
        run = flexmodel.open(out)
        late: list[float] = []
        looks: list[float] = []
        seen = 0
        while job.poll() is None:
            start = time.time_ns()
            new = run.refresh()
            now = time.time_ns()
            if new:
                records = run.records
                late += [(now - r.time_ns) / 1e6 for r in records[seen:]]
                seen = len(records)
            else:
                looks.append((now - start) / 1e6)
            time.sleep(1e-4)
        errors = job.stderr.read() if job.stderr else ""
        if job.returncode != 0 or seen < STEPS:
            sys.exit(f"bench: {seen} of {STEPS} records were seen\n{errors}")
        row("milliseconds", late, form="{:.2f}")
        row("99 of 100 within", [statistics.quantiles(late, n=100)[98]], form="{:.2f}")
        row("of which one look at the run", looks, form="{:.2f}")


if __name__ == "__main__":
    main()
