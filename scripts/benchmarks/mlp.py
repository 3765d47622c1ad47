"""Eight MLP outputs a step (16.8 MB) on FSDP2, two ranks: FlexModel, plain hooks, and hooks that gather to rank 0."""

import json
import statistics
import subprocess
import sys

from common import FLEXMODEL, HERE, cpu_seconds, environment, row, scratch, title

STEPS, ROUNDS = 8, 6
GOALS = {"flexmodel": "<= 1.02", "clone": "", "gather": ""}
NAMES = {
    "flexmodel": "flexmodel, whole tensors in a run directory",
    "clone": "hooks with .detach().clone(), kept in memory",
    "gather": "the same and dist.gather to rank 0, in memory",
}


def hooks(steps: int, rounds: int) -> str:
    """Clauses that tap every block that is FlexModel's turn, and no other."""
    from mlp_training import VARIANTS, order

    at, clauses = steps, []
    for number in range(rounds):
        for variant in order(number):
            if variant == "flexmodel":
                clauses.append(f"*.mlp@steps={at}..{at + steps - 1}")
            at += steps
    assert at == steps * (1 + rounds * len(VARIANTS))
    return ";".join(clauses)


def main() -> None:
    title("mlp: step time tapped / untapped, 8 MLP outputs (16.8 MB whole) a step, FSDP2, 2 ranks, one process")
    with scratch() as work:
        argv = [FLEXMODEL, "run", "--hooks", hooks(STEPS, ROUNDS), "--out", work / "run", "--"]
        argv += ["torchrun", "--standalone", "--nproc-per-node", "2", HERE / "mlp_training.py", STEPS, ROUNDS]
        job = subprocess.Popen(
            list(map(str, argv)), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert job.stdout
        # Seconds of a step, and seconds of rank 0's CPU for it, by variant.
        rounds: list[dict[str, tuple[float, float]]] = [{}]
        agent = 0.0
        for line in job.stdout:
            if line.startswith("BLOCK "):
                if len(rounds[-1]) == len(NAMES) + 1:
                    rounds.append({})
                variant, times, cpu = json.loads(line[6:])
                rounds[-1][variant] = (statistics.median(times), cpu / STEPS)
                agent = max(agent, cpu_seconds(job.pid))
        errors = job.stderr.read() if job.stderr else ""
        if job.wait() != 0:
            sys.exit(f"bench: the job failed\n{errors}")
        summary = [line for line in errors.splitlines() if line.startswith("flexmodel:")]
        for n, (what, goals) in enumerate((("step time", GOALS), ("CPU time of rank 0", {}))):
            row(f"untapped: {what}, milliseconds", [1e3 * r["untapped"][n] for r in rounds], form="{:.1f}")
            for variant, name in NAMES.items():
                row(name, [r[variant][n] / r["untapped"][n] for r in rounds], goals.get(variant, ""))
        # At a lower priority than the ranks, and in part while they wait for each other.
        print(f"  {'CPU time of the agent for a tapped step':<46} {1e3 * agent / STEPS / ROUNDS:9.1f}   milliseconds")
        print("  " + " ".join(summary[1:]))


if __name__ == "__main__":
    main()
