"""Opening runs of 1,000 and 100,000 records and getting tensors of them, from Python and by the command."""

import json
import pathlib
import subprocess
import sys
import time

from common import FLEXMODEL, ROOT, row, scratch, title

sys.path[:0] = [str(ROOT / "python-shim")]
import flexmodel

HEADER_SPACE = 1 << 20
ELEMENTS = 64
COUNTS = (1_000, 100_000)
ROUNDS = 5


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


def write(root: pathlib.Path, records: int) -> None:
    """A run of ten modules over so many steps."""
    root.mkdir()
    (root / "run.json").write_text(json.dumps({"format": 2, "flexmodel": "0.1.0", "finished_ns": 2, "world": 1}))
    size = 4 * ELEMENTS
    zeros = crc32c(bytes(size))
    stats = {"count": ELEMENTS, "nan": 0, "inf": 0, "zero": ELEMENTS}
    stats |= dict.fromkeys(("mean", "std", "l2", "absmax", "min", "max"), 0.0)
    with (root / "manifest.jsonl").open("wb") as manifest:
        for n in range(records):
            at = {"shard": "shard-00000", "offset": HEADER_SPACE + n * size, "len": size, "crc": zeros}
            line = {
                "t": "part", "module": f"layers.{n % 10}.mlp", "kind": "forward", "path": "out", "model": 0,
                "step": n // 10, "micro": 0, "call": 0, "repeat": 0, "train": True, "class": "MLP", "group": "",
                "dtype": "float32", "shape": [8, 8], "rank": 0, "axes": [], "dp_size": 1, "loss_scale": 1.0,
                "time_ns": 1_700_000_000_000_000_000 + n, "at": at, "stats": stats,
            }  # fmt: skip
            inner = json.dumps(line, separators=(",", ":")).encode()
            manifest.write(b'{"crc":"%08x","rec":%b}\n' % (crc32c(inner), inner))
    with (root / "shard-00000.open").open("wb") as shard:
        shard.truncate(HEADER_SPACE + records * size)


def timed(work) -> float:
    start = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - start)


def measure(root: pathlib.Path, records: int) -> None:
    title(f"reader: a run of {records:,} records, milliseconds")
    run = flexmodel.open(root)
    last = records // 10 - 1
    run.get("layers.3.mlp", step=0)
    row("open", [timed(lambda: flexmodel.open(root)) for _ in range(ROUNDS)], form="{:.1f}")
    row("open and go through all records", [timed(lambda: list(flexmodel.open(root).records)) for _ in range(ROUNDS)],
        form="{:.1f}")  # fmt: skip
    row("refresh, nothing new", [timed(run.refresh) for _ in range(ROUNDS)], form="{:.3f}")
    row("get", [timed(lambda: run.get("layers.3.mlp", step=last)) for _ in range(50)], form="{:.3f}")
    command = [FLEXMODEL, "ls", root]
    row("flexmodel ls", [timed(lambda: subprocess.run(command, stdout=subprocess.DEVNULL, check=True))
                         for _ in range(ROUNDS)], form="{:.1f}")  # fmt: skip


if __name__ == "__main__":
    with scratch() as work:
        for records in COUNTS:
            write(work / str(records), records)
            measure(work / str(records), records)
