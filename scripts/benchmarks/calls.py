"""Instructions of a module call that nobody selected, with and without the preload, by callgrind."""

import pathlib
import shutil
import subprocess
import sys

from common import HERE, environment, preload, scratch, title

REQUESTS = r"""
#include <valgrind/callgrind.h>
void begin(void) { CALLGRIND_START_INSTRUMENTATION; }
void zero(void) { CALLGRIND_ZERO_STATS; }
void dump(const char *name) { CALLGRIND_DUMP_STATS_AT(name); }
void end(void) { CALLGRIND_STOP_INSTRUMENTATION; }
"""
VARIANTS = {
    "without": {},
    "with the preload, armed": preload(""),
    "with the preload, hooks that match nothing": preload("no.such.module"),
    "with the preload, a hook on its neighbour": preload("selected"),
}


def per_call(out: pathlib.Path) -> float:
    """Instructions a call: what N more calls cost."""
    totals = {}
    for dump in out.parent.glob(out.name + ".*"):
        lines = dump.read_text().splitlines()
        trigger = next((line for line in lines if line.startswith("desc: Trigger: Client Request:")), None)
        if trigger:
            totals[int(trigger.rsplit(":", 1)[1])] = int(next(x for x in lines if x.startswith("totals:")).split()[1])
    (few, first), (many, second) = sorted(totals.items())
    return (second - first) / (many - few)


def main() -> None:
    title("calls: instructions of a module call that nobody selected (callgrind)")
    if not shutil.which("valgrind") or not shutil.which("gcc"):
        print("  left out: valgrind and gcc are needed (apt install valgrind gcc)")
        return
    with scratch() as work:
        (work / "requests.c").write_text(REQUESTS)
        subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", work / "requests.so", work / "requests.c"], check=True)
        running = []
        for n, extra in enumerate(VARIANTS.values()):
            argv = ["setarch", "-R", "valgrind", "--tool=callgrind", "--instr-atstart=no"]
            argv += [f"--callgrind-out-file={work}/out{n}"]
            argv += [sys.executable, str(HERE / "counted.py"), str(work / "requests.so")]
            with open(work / f"log{n}", "w") as log:
                running.append(subprocess.Popen(argv, env=environment(**extra), stderr=log))
        for n, (name, process) in enumerate(zip(VARIANTS, running, strict=True)):
            if process.wait() != 0:
                print((work / f"log{n}").read_text()[-3000:])
            goal = "" if n == 0 else "   goal: as without"
            print(f"  {name:<46} {per_call(work / f'out{n}'):9.1f}{goal}", flush=True)


if __name__ == "__main__":
    main()
