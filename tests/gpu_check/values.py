"""Captures whose values are known: of memory that is overwritten and reused at once, in pieces, on several streams."""

from __future__ import annotations

import shutil

import flexmodel
import known

import captures
from .setting import Setting

HOOKS = "make.*"


def wrong(run: flexmodel.Run, steps: int) -> list[str]:
    """Records that are missing, or not what `known.py` computed.

    -1 for a value says that it was copied after the job had gone on, -2 after its memory was another tensor's.
    """
    found = []
    for number, ramp in enumerate(known.ramps("cpu")):
        for step in range(steps):
            want = known.value(ramp, number, float(step + 1)).resolve_conj()
            try:
                got = run.get(f"make.{number}", step=step)
            except flexmodel.NotCapturedError:
                found.append(f"make.{number}, step {step}: no record")
                continue
            if captures.same_bytes(got, want):
                continue
            what = f"{got.dtype}{list(got.shape)}"
            if got.shape == want.shape and got.dtype == want.dtype:
                at = (got != want).flatten().nonzero()[0].item()
                what = f"{got.flatten()[at].item()} for {want.flatten()[at].item()} at {at} of {got.numel()}"
            found.append(f"make.{number}, step {step}: {what}")
    return found


def _judge(setting: Setting, run: flexmodel.Run, steps: int) -> None:
    """Every tensor of every step, and nothing else."""
    setting.fact("records", len(run.records))
    setting.expect(len(run.records) == steps * len(known.OUTPUTS), f"{len(run.records)} records")
    bad = wrong(run, steps)
    setting.expect(not bad, f"{len(bad)} tensors are wrong: {'; '.join(bad[:5])}")


def _stage(setting: Setting, case: str, steps: int, slab: str) -> None:
    job = setting.tapped(case, HOOKS, setting.program("known.py", case, steps), FLEXMODEL_SLAB=slab)
    _judge(setting, setting.sound(job.run), steps)


def reuse5(setting: Setting) -> None:
    """A slab that never fills."""
    _stage(setting, "reuse", 5, "256M")


def reuse(setting: Setting) -> None:
    """One that the job has to wait for, and that takes the largest in pieces."""
    _stage(setting, "reuse", 150 if setting.on_gpu else 6, "8M")


def streams(setting: Setting) -> None:
    """The same on three streams of the job's."""
    _stage(setting, "streams", 150 if setting.on_gpu else 3, "8M")
    if not setting.on_gpu:
        setting.needs_gpu("streams: the modules ran one after the other")


def sanitizer(setting: Setting) -> None:
    """Each tensor an allocation of its own, so that a copy from memory that is given back is an error."""
    steps, argv = 3, setting.program("known.py", "reuse", 3)
    if setting.on_gpu:
        tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
        if tool is None:
            setting.failed("compute-sanitizer is not on PATH, nor in /usr/local/cuda/bin")
            return
        # The driver's refusals, which torch asks for and handles, are no errors.
        argv = [tool, "--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "86", *argv]
    else:
        setting.needs_gpu("compute-sanitizer: the job ran without it")
    job = setting.tapped("sanitizer", HOOKS, argv, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    print(job.out[-2000:])
    setting.expect_on_gpu("ERROR SUMMARY: 0 errors" in job.out + job.err, "compute-sanitizer counts 0 errors")
    _judge(setting, setting.sound(job.run), steps)


