"""Several threads that run a model each, all at once: `threads.py THREADS CALLS ROWS [STOP]`; waits for STOP.

Without a number of calls, which is 0, the threads go on until STOP is there, and each rank prints how many it made.
What a model returns tells the rank, the thread and the call: see `value`.
"""

import itertools
import pathlib
import sys
import threading
import time

import parallel
import torch
import torch.distributed as dist
from torch import nn

WIDTH = 1024


class Same(nn.Module):
    """Gives a copy of what it is given."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 1.0


def value(rank: int, thread: int, call: int, rows: int) -> torch.Tensor:
    start = 1000.0 * (100 * rank + thread) + call
    return (torch.arange(rows * WIDTH, dtype=torch.float32) % 251 + start).reshape(rows, WIDTH)


def main(threads: int, calls: int, rows: int, stop: str = "") -> None:
    rank = dist.get_rank()
    models = [nn.Sequential() for _ in range(threads)]
    for number, model in enumerate(models):
        model.add_module(f"same{number}", Same())

    for number, model in enumerate(models):  # one after the other, so that they have the same numbers on every rank
        model(value(rank, number, 0, rows))

    def is_stopped() -> bool:
        return pathlib.Path(stop).exists()

    made = [1] * threads

    def work(number: int) -> None:
        for call in range(1, calls) if calls else itertools.count(1):
            models[number](value(rank, number, call, rows))
            made[number] += 1
            if stop and call % 5 == 0:
                print(f"at {rank} {number} {call}", flush=True)
                time.sleep(0.05)
                if not calls and is_stopped():
                    break

    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    while stop and not is_stopped():
        time.sleep(0.02)
    print("done", rank, sum(made), flush=True)


if __name__ == "__main__":
    parallel.launch(main, *map(int, sys.argv[1:4]), *sys.argv[4:])
