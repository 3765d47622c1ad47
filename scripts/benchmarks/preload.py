"""What the preload costs a job in which nothing is tapped: step time of two jobs that take turns."""

import statistics
import sys

from common import HERE, Worker, environment, preload, row, take_turns, title

JOBS = {
    "plain": ([sys.executable], 30),
    "FSDP2, 2 ranks": (["torchrun", "--standalone", "--nproc-per-node", "2"], 8),
}


def main() -> None:
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
