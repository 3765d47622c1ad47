"""Hooks that change while the job runs: how soon a command is answered, and what a step costs meanwhile."""

import contextlib
import json
import pathlib
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

from common import FLEXMODEL, HERE, environment, row, scratch, title

CHANGES = 12
# Selects, and captures nothing: what is measured is the change.
CLAUSES = "module.0@steps=0..0"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def job(work: pathlib.Path, nodes: int, ranks: int) -> Iterator[tuple[list[pathlib.Path], pathlib.Path]]:
    """A job of `ranks` on each of `nodes`, each with its agent: the runs' folders, and what rank 0 prints."""
    stop, out, port = work / "stop", work / "out", free_port()
    program = [str(HERE / "live_training.py"), str(stop)]
    processes = []
    with open(out, "w") as printed, open(work / "err", "w") as errors:
        for node in range(nodes):
            launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(nodes), "--node-rank", str(node)]
            launch += ["--nproc-per-node", str(ranks), "--master-addr", "127.0.0.1", "--master-port", str(port)]
            launch += program
            argv = [str(FLEXMODEL), "run", "--hooks", "", "--out", str(work / "run" / "{node}"), "--", *launch]
            env = environment(FLEXMODEL_NODE=f"node{node}")
            processes.append(subprocess.Popen(argv, env=env, stdout=printed, stderr=errors))
        try:
            while out.read_text().count("\n") < 20:
                if any(process.poll() is not None for process in processes):
                    sys.exit("bench: the job ended\n" + (work / "err").read_text()[-3000:])
                time.sleep(0.05)
            yield [work / "run" / f"node{node}" for node in range(nodes)], out
        finally:
            stop.touch()
            for process in processes:
                process.wait(120)


def measure(work: pathlib.Path, nodes: int, ranks: int) -> tuple[list[float], list[float]]:
    """Milliseconds from each command to its answer, and how many times as long steps take while a change is open."""
    answered, opened = [], []
    with job(work, nodes, ranks) as (runs, out):
        for n in range(CHANGES):
            command = [str(FLEXMODEL), "hooks", str(runs[n % nodes]), "set", CLAUSES, "--json"]
            began = time.time()
            done = subprocess.run(command, capture_output=True, text=True, env=environment())
            now = time.time()
            if done.returncode != 0:
                sys.exit(f"bench: {done.stderr}")
            answered.append((now - began) * 1e3)
            begins = json.loads(done.stdout)["step"]
            while True:
                steps = [tuple(map(float, line.split())) for line in out.read_text().splitlines()[:-1]]
                if steps and steps[-1][0] > begins + 5:
                    break
                time.sleep(0.05)
            # The command itself takes a core for a while: what is open is looked at from its answer on.
            open_ = [took for step, ended, took in steps if ended > now and step < begins]
            before = [took for _, ended, took in steps if ended < began][-len(open_) :]
            if open_ and before:
                opened.append(statistics.median(open_) / statistics.median(before))
    return answered, opened


def main() -> None:
    title("live: milliseconds from `flexmodel hooks` to its answer, and a step with a change open / with none")
    for name, nodes, ranks in (("2 ranks, an agent", 1, 2), ("4 ranks, an agent", 1, 4), ("2 ranks, two agents", 2, 1)):
        with scratch() as work:
            answered, opened = measure(work, nodes, ranks)
        row(f"{name}: ms to the answer", answered, form="{:.1f}")
        row(f"{name}: step open / none", opened, goal="1 within the spread")


if __name__ == "__main__":
    main()
