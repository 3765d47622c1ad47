"""Taps on a real GPU: equal losses, equal tensors, and what a capture costs. Run by scripts/gpu-check."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "python-shim"), str(HERE / "programs")]

import flexmodel

PROGRAM = str(HERE / "programs" / "gpu.py")
HOOKS = "layers.*.mlp:forward,backward,backward_pre;layers.*.turn:forward_pre;head"


def job(
    *arguments: str, hooks: str | None = None, out: str = "", env: dict[str, str] | None = None, ranks: int = 1
) -> tuple[str, list[float]]:
    """stdout and step times of the program, tapped if `hooks` are given."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(ranks),
        PROGRAM,
        *arguments,
    ]
    if hooks is not None:
        command = [os.environ["FLEXMODEL"], "run", "--hooks", hooks, "--out", out, "--", *command]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8", **(env or {})},
    )
    ours = [line for line in done.stderr.splitlines() if line.startswith("flexmodel:")]
    print(*ours, sep="\n")
    if done.returncode:
        sys.exit(f"the program failed ({done.returncode}):\n{done.stderr[-4000:]}")
    return done.stdout, [float(line.split()[2]) for line in done.stderr.splitlines() if line.startswith("time ")]


def reference(dtype: str) -> dict[tuple[str, str], torch.Tensor]:
    """Step 0 in this process, with plain hooks."""
    import gpu

    torch.use_deterministic_algorithms(True)
    model, seen = gpu.build(getattr(torch, dtype), 256, 4), {}
    for name, module in model.named_modules():
        if name.endswith(".mlp"):
            module.register_forward_hook(lambda m, i, o, n=name: seen.__setitem__((n, "forward"), o.detach().cpu()))
            module.register_full_backward_hook(
                lambda m, gi, go, n=name: seen.update({(n, "backward"): gi[0].cpu(), (n, "backward_pre"): go[0].cpu()})
            )
        if name.endswith(".turn"):
            module.register_forward_pre_hook(
                lambda m, i, n=name: seen.__setitem__((n, "forward_pre"), i[0].detach().cpu())
            )
        if name == "head":
            module.register_forward_hook(lambda m, i, o, n=name: seen.__setitem__((n, "forward"), o.detach().cpu()))
    # A full backward hook refuses the in-place operation behind it: the reference does without.
    for layer in model.layers:
        layer.forward = lambda x, layer=layer: x + layer.turn((layer.mlp(x) * 0.5).transpose(0, 1)).transpose(0, 1)
    gpu.batch(0, 8, 256, getattr(torch, dtype))
    model(gpu.batch(0, 8, 256, getattr(torch, dtype))).float().square().mean().backward()
    return seen


def collective(folder: str) -> None:
    """Tensors gathered over NCCL are those that the agent puts together."""
    if torch.cuda.device_count() < 2:
        print("assemble=collective over NCCL: not tried, it takes two GPUs and this machine has one")
        return
    for how in ("agent", "collective"):
        hooks = ";".join(f"{clause}@assemble={how}" for clause in HOOKS.split(";"))
        job("bfloat16", hooks=hooks, out=f"{folder}/{how}", ranks=2)
    command = [os.environ["FLEXMODEL"], "certify", f"{folder}/agent", f"{folder}/collective", "--exact"]
    print(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    notices = flexmodel.open(f"{folder}/collective").notices
    assert not notices, notices


def main() -> None:

    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    print(torch.__version__, torch.cuda.get_device_name(0))
    with tempfile.TemporaryDirectory() as folder:
        for dtype in ("float32", "bfloat16"):
            plain, _ = job(dtype)
            tapped, _ = job(dtype, hooks=HOOKS, out=f"{folder}/{dtype}")
            assert plain == tapped, f"{dtype}: losses differ\n{plain}\n{tapped}"
            run = flexmodel.open(f"{folder}/{dtype}")
            expected = reference(dtype)
            worst = 0.0
            for (module, kind), tensor in expected.items():
                got = run.get(module, kind=kind, step=0)
                assert got.dtype == tensor.dtype and got.shape == tensor.shape, (module, kind, got.shape, tensor.shape)
                assert torch.equal(got, tensor), (
                    f"{dtype} {module} {kind}: max error {(got.float() - tensor.float()).abs().max()}"
                )
                worst = max(worst, float((got.float() - tensor.float()).abs().max()))
            print(f"{dtype}: losses bitwise equal, {len(expected)} tensors equal to plain hooks (max error {worst})")
        # 8 outputs of 8 x 128 x 4096 in bfloat16 a step: odd steps are not tapped, so both are timed in one process.
        for slab in ("256M", "1G"):
            hooks = "layers.*.mlp:forward@every=2"
            _, times = job(
                "bfloat16",
                "4096",
                "8",
                "8",
                "60",
                hooks=hooks,
                out=f"{folder}/speed{slab}",
                env={"FLEXMODEL_SLAB": slab},
            )
            on, off = times[10::2], times[11::2]
            ratios = [a / b for a, b in zip(on, off, strict=True)]
            low, mid, high = statistics.quantiles(ratios, n=4)
            print(
                f"slab {slab}: {8 * 8 * 128 * 4096 * 2 / 1e6:.1f} MB a tapped step; "
                f"step {statistics.median(on) * 1e3:.2f} ms tapped, "
                f"{statistics.median(off) * 1e3:.2f} ms not; ratio median {mid:.3f} (quartiles {low:.3f} .. {high:.3f})"
            )
            assert len(flexmodel.open(f"{folder}/speed{slab}").records) == 8 * 30
        collective(folder)


if __name__ == "__main__":
    main()
