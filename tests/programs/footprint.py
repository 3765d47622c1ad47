"""Trains in one process and prints the most memory of its own that it had, in KiB: `footprint.py STEPS`.

Memory of its own is what no other process can see: neither files nor shared memory.
"""

import pathlib
import re
import sys

import torch
import wide


def now(what: str) -> int:
    return int(re.search(rf"^{what}:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text(), re.M)[1])


def main(steps: int) -> None:
    torch.set_num_threads(1)
    model = wide.build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    most = 0
    for step in range(steps):
        # Every other input lies in memory column by column.
        rows = wide.batch(step, 64 + 192 * (step % 2), 0)
        rows = rows.t().contiguous().t() if step % 2 else rows
        loss = model(rows).square().mean()
        optimizer.zero_grad()
        loss.backward()
        most = max(most, now("RssAnon"))
        optimizer.step()
        wide.tiny.report(0, step, loss)
    print("memory", most, "shared", now("RssShmem"))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
