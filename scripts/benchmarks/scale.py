"""What a record costs in jobs of 8, 64 and 512 ranks, eight ranks to an agent.

The ranks are simulated: the example `produce` plays eight of them for one agent, with slabs, layouts and names as ranks
of a job of that size have them. Nothing in an agent depends on another, so the agents of a job run one after the other:
what is measured is one node of it at a time, and its memory is one node's. Sizes take turns in each round.
The cost is the agent's CPU time, over its whole life, a tensor of a rank; waiting for the disk is not in it.
"""

import os
import pathlib
import subprocess
import sys
import time
from dataclasses import dataclass

from common import EXAMPLES, FLEXMODEL, ROOT, environment, row, scratch, title

ROUNDS, NODE, WORLDS = 8, 8, (8, 64, 512)
STEPS, ELEMENTS, LAYERS = 40, 1024, 4
TENSORS = NODE * STEPS * (2 * LAYERS + 3)
"""That a node's ranks capture: `produce` has forward and backward of every layer, and three more."""


@dataclass
class Sample:
    """One node of a job."""

    cpu: float
    seconds: float
    peak_kib: int
    on_disk: int
    apparent: int


def node(run: pathlib.Path, socket: pathlib.Path, number: int, world: int) -> Sample:
    """Runs node `number` of a job of `world` ranks, which captures into `run`."""
    argv = [FLEXMODEL, "agent", "--socket", socket, "--out", run]
    agent = subprocess.Popen(argv, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not socket.is_socket():
        time.sleep(0.005)
    start = time.perf_counter()
    ranks = ["--ranks", str(NODE), "--first-rank", str(NODE * number), "--world", str(world), "--slab", "4M"]
    sizes = ["--steps", str(STEPS), "--elements", str(ELEMENTS), "--layers", str(LAYERS)]
    subprocess.run([EXAMPLES / "produce", "--socket", socket, *ranks, *sizes], check=True)
    agent.terminate()
    errors = agent.stderr.read() if agent.stderr else ""
    _, status, used = os.wait4(agent.pid, 0)
    seconds = time.perf_counter() - start
    agent.returncode = os.waitstatus_to_exitcode(status)
    if agent.returncode or " 0 dropped" not in errors:
        sys.exit(f"bench: the agent failed\n{errors}")
    files = [f.stat() for f in run.glob("*.safetensors")]
    on_disk, apparent = sum(f.st_blocks * 512 for f in files), sum(f.st_size for f in files)
    return Sample(used.ru_utime + used.ru_stime, seconds, used.ru_maxrss, on_disk, apparent)


def agents(work: pathlib.Path) -> None:
    """Every node of the largest job, an eighth of them a round, beside one node of each smaller one."""
    found: dict[int, list[list[Sample]]] = {world: [] for world in WORLDS}
    for n in range(ROUNDS):
        for world in WORLDS if n % 2 else WORLDS[::-1]:
            nodes = world // NODE
            each = max(1, nodes // ROUNDS)
            # A job of one node runs it anew in every round.
            runs = [(f"{world}/node-{i:02}", i) for i in range(n * each, (n + 1) * each)]
            runs = runs if nodes > 1 else [(f"{world}/round-{n}", 0)]
            found[world].append([node(work / run, work / "s", number, world) for run, number in runs])
    title(f"scale: one agent for {NODE} ranks of a job, {TENSORS} tensors of {4 * ELEMENTS} bytes, {ROUNDS} rounds")
    for world, rounds in found.items():
        every = [sample for samples in rounds for sample in samples]
        row(f"{world} ranks: CPU microseconds a tensor", [1e6 * s.cpu / TENSORS for s in every], form="{:.1f}")
        row(f"{world} ranks: tensors/s an agent", [TENSORS / s.seconds for s in every], form="{:.0f}")
        row(f"{world} ranks: MB/s an agent", [4e-6 * ELEMENTS * TENSORS / s.seconds for s in every], form="{:.1f}")
        row(f"{world} ranks: MB on disk", [1e-6 * s.on_disk for s in every], form="{:.1f}")
        row(f"{world} ranks: MB of files, with holes", [1e-6 * s.apparent for s in every], form="{:.1f}")
        row(f"{world} ranks: peak MiB of an agent", [s.peak_kib / 1024 for s in every], form="{:.0f}")
    for world in WORLDS[1:]:
        ratios = [
            sum(s.cpu for s in large) / len(large) / small[0].cpu
            for large, small in zip(found[world], found[WORLDS[0]], strict=True)
        ]
        row(f"CPU a tensor, {world} ranks / {WORLDS[0]}", ratios, "1, whatever the ranks")


def reader(work: pathlib.Path) -> None:
    """`flexmodel.open` of every node's run as one, and `get` of a tensor that lies on all of them."""
    sys.path.insert(0, str(ROOT / "python-shim"))
    import flexmodel

    title("scale: the reader, over all nodes of a job")
    for world in WORLDS:
        path = work / str(world)
        path = path / "round-0" if world == NODE else path
        parts = world // NODE * TENSORS
        opening, getting = [], []
        for _ in range(3):
            start = time.perf_counter()
            run = flexmodel.open(path)
            opening.append(1e6 * (time.perf_counter() - start) / parts)
            for step in range(STEPS - 5, STEPS):
                start = time.perf_counter()
                whole = run.get("layers.1.mlp", step=step)
                getting.append(1e6 * (time.perf_counter() - start))
            assert whole.shape[0] == 8 * world
            del run, whole
        row(f"{world} ranks: open, microseconds a part ({parts} parts)", opening, form="{:.1f}")
        size = f"{4e-6 * ELEMENTS * world:.2f} MB"
        row(f"{world} ranks: get of {size}, microseconds a part", [g / world for g in getting], form="{:.1f}")


if __name__ == "__main__":
    with scratch() as work:
        agents(work)
        reader(work)
