"""The agent to disk against dd with fsync of the same bytes, and the reader against mmap."""

import mmap
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable

from common import EXAMPLES, FLEXMODEL, ROOT, environment, row, scratch, title

ROUNDS, ELEMENTS, STEPS = 5, 16 << 20, 1


def agent_to_disk(work: pathlib.Path) -> tuple[float, int]:
    """Seconds from a slab full of tensors to everything synced and sealed, and the bytes of the sealed files."""
    run, socket = work / "run", work / "s"
    agent = subprocess.Popen(
        [FLEXMODEL, "agent", "--socket", socket, "--out", run], env=environment(), stderr=subprocess.PIPE, text=True,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    while not socket.is_socket():
        time.sleep(0.01)
    # While it stands still, its rank makes up tensors and fills the slab: that is not what is measured.
    agent.send_signal(signal.SIGSTOP)
    argv = [EXAMPLES / "produce", "--socket", socket, "--ranks", "1", "--layers", "4", "--slab", "1G"]
    rank = subprocess.Popen([*argv, "--steps", str(STEPS), "--elements", str(ELEMENTS)])
    until_idle(rank.pid)
    start = time.perf_counter()
    agent.send_signal(signal.SIGCONT)
    rank.wait()
    agent.terminate()
    _, errors = agent.communicate()
    seconds = time.perf_counter() - start
    if agent.returncode != 0 or rank.returncode != 0:
        sys.exit(f"bench: the agent failed\n{errors}")
    return seconds, sum(f.stat().st_size for f in run.glob("*.safetensors"))


def until_idle(pid: int) -> None:
    """Returns once a process has used no CPU for a while, but had used some."""
    used, since = 0.0, time.monotonic()
    while time.monotonic() - since < 0.5:
        time.sleep(0.05)
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        now = int(fields[11]) + int(fields[12])
        if now != used or now < 10:
            used, since = now, time.monotonic()


def dd(source: pathlib.Path, target: pathlib.Path) -> float:
    """Seconds that dd takes for the same bytes, from the page cache to the disk."""
    start = time.perf_counter()
    subprocess.run(["dd", f"if={source}", f"of={target}", "bs=1M", "conv=fsync", "status=none"], check=True)
    return time.perf_counter() - start


def disk() -> None:
    title("disk: bytes a second of agent / dd conv=fsync, the same bytes, until they are synced")
    ratios, speeds = [], []
    with scratch() as work:
        for _ in range(ROUNDS):
            seconds, size = agent_to_disk(work)
            source, copy = work / "all", work / "copy"
            with source.open("wb") as out:
                for shard in sorted((work / "run").glob("*.safetensors")):
                    with shard.open("rb") as part:
                        shutil.copyfileobj(part, out, 1 << 20)
            os.sync()
            by_dd = dd(source, copy)
            ratios.append(by_dd / seconds)
            speeds.append(size / by_dd / 1e9)
            for path in (source, copy):
                path.unlink()
            shutil.rmtree(work / "run")
            os.sync()
    row("speed of the agent / dd", ratios, ">= 0.9")
    row("dd, GB/s", speeds, form="{:.2f}")


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def reader() -> None:
    sys.path.insert(0, str(ROOT / "python-shim"))
    import flexmodel
    import numpy as np

    title("reader: run.get of a 64 MiB tensor / mmap of the same bytes")
    with scratch() as work:
        agent_to_disk(work)
        run = flexmodel.open(work / "run")
        record = next(r for r in run.records if (r.module, r.kind) == ("layers.0.mlp", "forward"))
        at = record.parts[0].at
        assert at is not None
        path = work / "run" / f"{at.shard}.safetensors"

        def mapped() -> np.ndarray:
            with path.open("rb") as file:
                view = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
            return np.frombuffer(view, np.float32, at.nbytes // 4, at.offset)

        def got() -> np.ndarray:
            return np.asarray(run.get("layers.0.mlp", step=0))

        assert np.array_equal(got().ravel(), mapped())
        opening: list[tuple[float, float]] = []
        reading: list[tuple[float, float]] = []
        for n in range(20):
            pair = [lambda: timed(got), lambda: timed(mapped)]
            both = [lambda: timed(lambda: got().max()), lambda: timed(lambda: mapped().max())]
            for samples, sides in ((opening, pair), (reading, both)):
                times = [side() for side in (sides if n % 2 else sides[::-1])]
                samples.append(tuple(times if n % 2 else times[::-1]))
        row("get, microseconds", [1e6 * a for a, _ in opening], form="{:.0f}")
        row("mmap, microseconds", [1e6 * b for _, b in opening], form="{:.0f}")
        row("time of get and a pass over it / mmap and the same", [a / b for a, b in reading], "about 1")


if __name__ == "__main__":
    disk()
    reader()
