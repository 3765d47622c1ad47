"""What this machine has, what its driver does, and what its NCCL does."""

from __future__ import annotations

import json
import os
import pathlib
import platform
import subprocess
import sys

import torch

from . import driver
from .setting import Setting
from harness import ROOT

HERE = pathlib.Path(__file__).parent
REQUIRED = ("shared memory", "unix sockets", "preload library", "python", "torch", "bridge")
"""What `flexmodel doctor` has to find. A compiler need not be there: the bridge came with FlexModel."""


def facts(setting: Setting) -> None:
    """The machine, its torch, and whether FlexModel works there."""
    query = "--query-gpu=name,driver_version,memory.total,pcie.link.gen.current,pcie.link.width.current"
    setting.fact("GPUs", setting.command("nvidia-smi", query, "--format=csv,noheader").strip().splitlines())
    setting.fact("system", platform.platform())
    setting.fact("python", platform.python_version())
    setting.fact("torch", torch.__version__)
    setting.fact("cores", os.cpu_count())
    setting.fact("LD_LIBRARY_PATH", os.environ.get("LD_LIBRARY_PATH", ""))
    libraries = setting.command("ldconfig", "-p").splitlines()
    setting.fact("libcuda", [line.strip() for line in libraries if "libcuda.so" in line])
    setting.command("df", "-h", str(setting.work))
    setting.expect_on_gpu(setting.on_gpu and torch.cuda.is_available(), "torch sees a GPU")
    if setting.on_gpu:
        setting.fact("NCCL", torch.cuda.nccl.version())
    doctor = setting.job([setting.flexmodel, "doctor", "--json", "--python", sys.executable], may_fail=True)
    checks = {check["name"]: check for check in json.loads(doctor.out)["checks"]}
    for name, check in checks.items():
        setting.fact(f"doctor: {name}", f"{check['state']}: {check['found']}")
    bad = [name for name in REQUIRED if checks[name]["state"] != "ok"]
    setting.expect(not bad, f"doctor misses {', '.join(bad)}")
    setting.expect_on_gpu(checks["GPU"]["state"] == "ok", "doctor finds the CUDA driver")


def _driver(setting: Setting, what: str) -> subprocess.Popen[str]:
    """A process of its own: what fails there leaves nothing behind."""
    argv = [sys.executable, str(HERE / "driver.py"), what, setting.device]
    return subprocess.Popen(argv, env=setting.environment(), stdout=subprocess.PIPE, text=True)


def _answer(setting: Setting, process: subprocess.Popen[str]) -> dict | None:
    """What it printed; that it printed nothing is a failure."""
    said, _ = process.communicate()
    lines = said.splitlines()
    if process.returncode or not lines:
        setting.failed(f"{process.args} ended with {process.returncode}")
        return None
    return json.loads(lines[-1])


def probe(setting: Setting) -> None:
    """Threads, capture modes, pinned memory: what the bridge relies on."""
    found = _answer(setting, _driver(setting, "facts"))
    if found is None:
        return
    for name, value in found.items():
        setting.fact(name, value)
    setting.expect(not found["context of a fresh thread"], "a fresh thread has no context")
    code = found["exchange on a fresh thread"]
    # 201 is CUDA_ERROR_INVALID_CONTEXT: then a thread of ours needs a context before it sets its mode.
    setting.expect(code in (0, 201), f"the capture mode of a fresh thread cannot be set: {code}")
    setting.expect(found["register"] == 0, f"a memfd cannot be page-locked: {found['register']}")
    setting.expect_on_gpu(found["register ms"] <= 400, "256 MiB are page-locked in at most 400 ms")
    for size in ("16 MB", "64 MB"):
        ours, theirs = found[f"registered, {size}"], found[f"the driver's, {size}"]
        setting.expect_on_gpu(
            ours["GB/s"] >= 0.95 * theirs["GB/s"], f"copies of {size} into a page-locked memfd are as quick as any"
        )
        setting.expect_on_gpu(ours["us a call"] <= 10, f"a copy of {size} takes at most 10 us of the host")
    slow = found["pageable, 16 MB"]
    setting.expect_on_gpu(
        slow["us a call"] > 5 * found["registered, 16 MB"]["us a call"], "a copy into pageable memory holds the host up"
    )


def captures(setting: Setting) -> None:
    """What breaks a graph that is being captured, and that none of it does where the thread is relaxed."""
    if not setting.on_gpu:
        setting.needs_gpu("captures: a stand-in with the documented rule answered")
    running = {name: _driver(setting, name) for name in driver.CAPTURES}
    for name, process in running.items():
        found = _answer(setting, process)
        if found is None:
            continue
        setting.fact(name, found["capture"])
        survives, expected = found["capture"] == "survives", driver.CAPTURES[name]
        said = "survives" if expected else "breaks"
        setting.expect(expected in (None, survives), f"{name}: the capture was to be one that {said}: {found}")


def nccl(setting: Setting) -> None:
    """Communicators of one rank: a transfer, the end in good order, and what cannot complete, in time."""
    packed, built = setting.prefix / "bin" / "nccl-probe", ROOT / "target" / "release"
    program = packed if packed.is_file() else built / "examples" / "probe"
    if setting.on_gpu:
        maps = pathlib.Path("/proc/self/maps").read_text().splitlines()
        loaded = [line.split()[-1] for line in maps if "libnccl.so.2" in line]
        argv = [str(program), *loaded[:1]]  # torch's own
    else:
        setting.needs_gpu("NCCL: a stand-in took the calls, between memory of the process")
        standin = setting.prefix / "lib" / "libnccl-standin.so"
        argv = [str(program), str(standin if standin.is_file() else built / "libnccl.so"), "--host"]
    if not all(pathlib.Path(path).is_file() for path in argv[:2]):
        setting.failed(f"{argv[:2]} are not there: scripts/test builds them, and a payload has them")
        return
    job = setting.job(argv, NCCL_DEBUG="WARN")
    print(job.out, end="")
    setting.expect(job.out.endswith("as it has to be\n"), "a communicator does as it has to")
    for line in ("NCCL ", "a communicator of one rank", "a send that nobody receives", "a rank that never comes"):
        setting.expect(any(said.startswith(line) for said in job.out.splitlines()), f"no line begins with {line!r}")
    setting.expect_on_gpu("the stream goes on" in job.out, "a stream goes on after an abort")
