"""CUDA graphs: taps harm neither their capture nor what they compute, and say what they cannot see."""

from __future__ import annotations

import collections

import cuda_graphs
import flexmodel

import captures
from .setting import Setting

INSIDE = "CUDA graph"
"""In the reason of whatever is refused inside of one."""


def beside(setting: Setting) -> None:
    """Graphs captured by hand: inside of them all is refused by name, and beside them nothing is lost."""
    steps, depth = 20 if setting.on_gpu else 2, cuda_graphs.DEPTH
    argv = setting.program("cuda_graphs.py", "beside", steps)
    plain = setting.job(argv)
    # On a CPU a slice that no tensor has stands for what is refused inside of a graph.
    hooks, why = ("layers.*", INSIDE) if setting.on_gpu else ("layers.*;layers.0.0@slice=[:,:,0]", "slice")
    job = setting.tapped("beside", hooks, argv)
    setting.expect(plain.out == job.out, f"sums differ: {plain.out.strip()}, tapped {job.out.strip()}")
    run = flexmodel.open(job.run)
    setting.expect(not run.problems, f"problems: {run.problems}")
    if not setting.on_gpu:
        setting.needs_gpu("graphs: their calls and replays were passes as any other")
    passes = steps if setting.on_gpu else 4 * steps + 1
    setting.expect(len(run.records) == passes * depth, f"{len(run.records)} records, not {passes * depth}")
    by_module = collections.defaultdict(list)
    for record in run.records:
        by_module[record.model, record.module].append(record.tensor())
    # What a model computes of one input is the same each time.
    unlike = [name for name, (one, *rest) in by_module.items() if not all(captures.same_bytes(one, t) for t in rest)]
    setting.expect(not unlike, f"not the same in each pass: {unlike}")
    reasons = {refusal.reason for refusal in run.refused}
    setting.fact("refused", sorted(reasons))
    setting.expect(bool(reasons) and all(why in reason for reason in reasons), f"not refused by name: {reasons}")
    listed = setting.command(setting.flexmodel, "ls", str(job.run))
    print(listed)
    setting.expect(why in listed, "`flexmodel ls` does not say so")


def callables(setting: Setting) -> None:
    """make_graphed_callables takes a module that has hooks of ours, and the job computes what it does without them."""
    steps = 5
    argv = setting.program("cuda_graphs.py", "callables", steps)
    plain = setting.job(argv)
    job = setting.tapped("callables", "layers.*:forward,backward", argv)
    setting.expect(plain.out == job.out, f"losses differ: {plain.out.strip()}, tapped {job.out.strip()}")
    if not setting.on_gpu:
        setting.needs_gpu("graphs: none was made")
    found, passes = len(flexmodel.open(job.run).records), 1 if setting.on_gpu else steps + 1
    setting.fact("records", found)
    # Forward and backward of the call before there is a graph.
    setting.expect(found >= 2 * passes * cuda_graphs.DEPTH, f"{found} records, fewer than before there is a graph")


def compiled(setting: Setting) -> None:
    """reduce-overhead puts our operations into no graph: no gradient is missing, and losses are those without taps."""
    steps = 8 if setting.on_gpu else 3
    argv = setting.program("cuda_graphs.py", "compiled", steps)
    plain = setting.job(argv)
    job = setting.tapped("compiled", "layers.*:forward,backward", argv)
    before, after = plain.losses, job.losses
    setting.fact("losses bitwise equal", before == after)
    setting.expect(len(before) == len(after) and captures.close_losses(after, before), f"losses {after}, not {before}")
    if not setting.on_gpu:
        setting.expect(before == after, "aot_eager changes no loss")
        setting.needs_gpu("reduce-overhead: compiled by aot_eager")
    run = setting.sound(job.run)
    expected = 2 * steps * cuda_graphs.DEPTH
    setting.expect(len(run.records) == expected, f"{len(run.records)} records, not {expected}")
