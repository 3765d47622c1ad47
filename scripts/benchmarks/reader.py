"""Opening runs of 1,000 and 100,000 records and getting tensors of them, from Python and by the command.

With FLEXMODEL_BEFORE set to a checkout of an earlier version (its `target/release/flexmodel` built, and what its
`python-shim` needs), that one takes turns with this one. Ratios are those of CPU time: all is read from memory, by one
thread, and so the rest of the machine counts less.
"""

import json
import os
import pathlib
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable

from common import FLEXMODEL, ROOT, Worker, row, scratch, take_turns, title

HEADER_SPACE = 1 << 20
ELEMENTS = 64
COUNTS = (1_000, 100_000)
ROUNDS = {1_000: 40, 100_000: 10}
MORE = 100
"""Records that the run grows by before it is refreshed."""
TASKS = {
    "open": "open",
    "all": "open and go through all records",
    "get": "get",
    "first": "open and get",
    "module": "records of a module",
    "same": "refresh, nothing new",
    "grown": f"refresh, {MORE} records more",
    "ls": "flexmodel ls",
    "json": "flexmodel ls --json",
}


def crc_table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return table


TABLE = crc_table()


def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def lines(first: int, count: int) -> bytes:
    """`count` records of ten modules, from number `first` on, in format 1, which every version reads."""
    out = bytearray()
    size = 4 * ELEMENTS
    zeros = crc32c(bytes(size))
    stats = {"count": ELEMENTS, "nan": 0, "inf": 0, "zero": ELEMENTS}
    stats |= dict.fromkeys(("mean", "std", "l2", "absmax", "min", "max"), 0.0)
    for n in range(first, first + count):
        at = {"shard": "shard-00000", "offset": HEADER_SPACE + n * size, "len": size, "crc": zeros}
        line = {
            "t": "part", "module": f"layers.{n % 10}.mlp", "kind": "forward", "path": "out", "model": 0,
            "step": n // 10, "micro": 0, "call": 0, "repeat": 0, "train": True, "recompute": False, "class": "MLP",
            "group": "", "dtype": "float32", "shape": [8, 8], "rank": 0, "axes": [], "dp_size": 1, "loss_scale": 1.0,
            "time_ns": 1_700_000_000_000_000_000 + n, "at": at, "stats": stats,
        }  # fmt: skip
        inner = json.dumps(line, separators=(",", ":")).encode()
        out += b'{"crc":"%08x","rec":%b}\n' % (crc32c(inner), inner)
    return bytes(out)


def grow(root: pathlib.Path, first: int, count: int) -> None:
    with (root / "manifest.jsonl").open("ab") as manifest:
        manifest.write(lines(first, count))
    with (root / "shard-00000.open").open("ab") as shard:
        shard.truncate(HEADER_SPACE + (first + count) * 4 * ELEMENTS)


def write(root: pathlib.Path, records: int) -> None:
    root.mkdir()
    (root / "run.json").write_text(json.dumps({"format": 1, "flexmodel": "0.1.0", "world": 1}))
    grow(root, 0, records)


def cpu() -> float:
    """CPU seconds so far, of this process and of those that it has waited for."""
    spent = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in spent)


def timed(work: Callable[[], object], child: bool = False) -> tuple[float, float]:
    """Milliseconds by the clock, and of CPU time."""
    now = cpu if child else time.process_time
    start, before = time.perf_counter(), now()
    work()
    return 1e3 * (time.perf_counter() - start), 1e3 * (now() - before)


def answer(checkout: str, binary: str, address: str) -> None:
    """Does what it is asked to with the package of a checkout, and says how many milliseconds that took."""
    from multiprocessing.connection import Client

    sys.path[:0] = [f"{checkout}/python-shim"]
    import flexmodel

    assert (flexmodel.__file__ or "").startswith(checkout), flexmodel.__file__
    runs: dict[str, flexmodel.Run] = {}

    def work(task: str, root: str) -> tuple[float, float]:
        if root not in runs:
            runs[root] = flexmodel.open(root)
            runs[root].get("layers.3.mlp", step=0)
        run, step = runs[root], random.randrange(100)
        if task == "open":
            return timed(lambda: flexmodel.open(root))
        if task == "all":
            return timed(lambda: list(flexmodel.open(root).records))
        if task == "get":
            return timed(lambda: run.get("layers.3.mlp", step=step))
        if task == "first":
            return timed(lambda: flexmodel.open(root).get("layers.3.mlp", step=step))
        if task == "module":
            return timed(lambda: run["layers.3.mlp"])
        if task in ("same", "grown"):
            return timed(run.refresh)
        command = [binary, "ls", root] + (["--json"] if task == "json" else [])
        return timed(lambda: subprocess.run(command, stdout=subprocess.DEVNULL, check=True), child=True)

    with Client(address) as connection:
        while (asked := connection.recv()) is not None:
            connection.send(work(*asked))


def worker(checkout: pathlib.Path, binary: pathlib.Path) -> Worker:
    started = Worker([sys.executable, __file__, str(checkout), str(binary)], dict(os.environ, PYTHONPATH=""))
    started.ready()
    return started


def measure(root: pathlib.Path, records: int, now: Worker, before: Worker | None) -> None:
    title(f"reader: a run of {records:,} records, milliseconds{', and CPU time beside before' if before else ''}")
    first = records
    for task, name in TASKS.items():
        pairs = []
        for n in range(ROUNDS[records] * (5 if task == "get" else 1)):
            if task == "grown":
                grow(root, first, MORE)
                first += MORE
            if before is None:
                pairs.append((now.round((task, str(root))), None))
            elif n % 2 == 0:
                pairs += take_turns(now, before, (task, str(root)), 1)
            else:
                pairs += [pair[::-1] for pair in take_turns(before, now, (task, str(root)), 1)]
        ours = [one for one, _ in pairs]
        row(name, [wall for wall, _ in ours])
        row("    CPU time", [spent for _, spent in ours])
        if before:
            theirs = [other for _, other in pairs]
            row("    CPU time before", [spent for _, spent in theirs])
            ratios = [mine / max(other, 1e-6) for (_, mine), (_, other) in zip(ours, theirs, strict=True)]
            row("    ratio", ratios, "<= 1")


def main() -> None:
    now, before = worker(ROOT, FLEXMODEL), None
    if old := os.environ.get("FLEXMODEL_BEFORE"):
        before = worker(pathlib.Path(old), pathlib.Path(old, "target/release/flexmodel"))
    with scratch() as work:
        for records in COUNTS:
            write(work / str(records), records)
            measure(work / str(records), records, now, before)
    now.end()
    if before:
        before.end()


if __name__ == "__main__":
    answer(*sys.argv[1:]) if len(sys.argv) > 1 else main()
