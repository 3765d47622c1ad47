"""What the preload costs a job in which nothing is tapped: step time of two jobs that take turns, and CPU time of a
plain process."""

import os
import resource
import statistics
import sys

from common import HERE, LIBRARY, Worker, environment, preload, row, take_turns, title

JOBS = {
    "plain": ([sys.executable], 30),
    "FSDP2, 2 ranks": (["torchrun", "--standalone", "--nproc-per-node", "2"], 8),
}


PLAIN = "/bin/true"


def cpu_ms(env: dict[str, str], count: int = 100) -> float:
    """CPU milliseconds of a plain process in this environment."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    for _ in range(count):
        os.waitpid(os.posix_spawn(PLAIN, [PLAIN], env), 0)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / count * 1e3


def plain_processes() -> None:
    """Three kinds of the same process, in turns."""
    title(f"preload: {PLAIN} with the preload, against the same without")
    without = environment()
    kinds = {"without hooks": without | {"LD_PRELOAD": str(LIBRARY)}, "with hooks": without | preload("a:forward")}
    rounds = [(cpu_ms(without), {name: cpu_ms(env) for name, env in kinds.items()}) for _ in range(30)]
    row("CPU ms of a process, no preload", [alone for alone, _ in rounds])
    for name in kinds:
        row(f"CPU ms more of a process, {name}", [more[name] - alone for alone, more in rounds], "0.15")


def main() -> None:
    plain_processes()
    title("preload: a job with the preload and hooks that match nothing, against the same job without")
    for name, (launcher, steps) in JOBS.items():
        argv = [*launcher, str(HERE / "training.py")]
        with_it = Worker(argv, environment(**preload("no.such.module:forward,backward")))
        without = Worker(argv, environment())
        with_it.ready()
        without.ready()
        pairs = take_turns(with_it, without, steps, rounds=30)
        row(f"step time, {name}", [statistics.median(a) / statistics.median(b) for (a, _), (b, _) in pairs], "1.00")
        row(f"CPU time of rank 0, {name}", [a / b for (_, a), (_, b) in pairs], "1.00")
        with_it.end()
        without.end()


if __name__ == "__main__":
    main()
