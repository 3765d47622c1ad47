"""Taps in training under FSDP2: equal losses, and tensors equal to those that plain hooks see."""

from __future__ import annotations

import flexmodel
import gpu
import torch

import captures
from .setting import Setting

ACTIVATIONS = "layers.*.mlp:forward,backward,backward_pre;layers.*.turn:forward_pre;head"
HOOKS = f"{ACTIVATIONS};head:param,grad"
DTYPES = ("float32", "bfloat16")


def reference(dtype: str, device: str) -> tuple[dict[tuple[str, str], torch.Tensor], list[tuple[str, str]]]:
    """Step 0 in this process, with plain hooks; and of what there is no gradient."""
    torch.use_deterministic_algorithms(True)
    model = gpu.build(dtype, device)
    seen: dict[tuple[str, str], torch.Tensor] = {}
    absent: list[tuple[str, str]] = []

    def keep(name: str, kind: str, tensor: torch.Tensor | None) -> None:
        if tensor is None:  # what the first layer is given needs no gradient
            absent.append((name, kind))
        else:
            seen[name, kind] = tensor.detach().cpu()

    for name, module in model.named_modules():
        if name.endswith(".mlp") or name == "head":
            module.register_forward_hook(lambda _m, _i, out, name=name: keep(name, "forward", out))
        if name.endswith(".mlp"):
            module.register_full_backward_hook(lambda _m, given, _o, name=name: keep(name, "backward", given[0]))
            module.register_full_backward_pre_hook(lambda _m, came, name=name: keep(name, "backward_pre", came[0]))
        if name.endswith(".turn"):
            module.register_forward_pre_hook(lambda _m, given, name=name: keep(name, "forward_pre", given[0]))
    for layer in model.layers:  # a full backward hook refuses the in-place operation behind it
        layer.forward = lambda x, layer=layer: x + layer.turn((layer.mlp(x) * 0.5).transpose(0, 1)).transpose(0, 1)
    for name, parameter in model.head.named_parameters():
        keep(f"head.{name}", "param", parameter.clone())
    gpu.loss_of(model(gpu.batch(0, dtype, device))).backward()
    for name, parameter in model.head.named_parameters():
        keep(f"head.{name}", "grad", parameter.grad)
    return seen, absent


def _compare(setting: Setting, run: flexmodel.Run, dtype: str) -> None:
    expected, absent = reference(dtype, setting.device)
    unlike = []
    for (module, kind), tensor in expected.items():
        try:
            got = run.get(module, kind=kind, step=0)
        except flexmodel.NotCapturedError:
            unlike.append(f"{module} {kind}: no record")
            continue
        if not captures.same_bytes(got, tensor):
            error = "another form" if got.shape != tensor.shape else (got.double() - tensor.double()).abs().max().item()
            unlike.append(f"{module} {kind}: max error {error}")
    setting.expect(not unlike, f"{dtype}: {len(unlike)} of {len(expected)} tensors differ: {'; '.join(unlike[:5])}")
    there = {(record.module, record.kind) for record in run.records}
    setting.expect(not there & set(absent), f"{dtype}: records of gradients that there are not: {there & set(absent)}")
    setting.expect(there == set(expected), f"{dtype}: unexpected records: {there ^ set(expected)}")
    setting.fact(f"{dtype}: equal to plain hooks", len(expected) - len(unlike))


def _losses(setting: Setting, ranks: int, dtype: str, hooks: str, name: str) -> flexmodel.Run:
    """Both jobs print the same, in whatever order their ranks do."""
    steps = 4 if setting.on_gpu else 2
    argv = setting.on_ranks(ranks, "gpu.py", dtype, steps)
    plain, job = setting.job(argv), setting.tapped(name, hooks, argv)
    before, after = sorted(plain.out.splitlines()), sorted(job.out.splitlines())
    setting.expect(len(before) >= steps and before == after, f"{name}: {after}, untapped {before}")
    return setting.sound(job.run)


def training(setting: Setting) -> None:
    """FSDP2 over one rank, in float32 and bfloat16; over two GPUs where there are any."""
    for dtype in DTYPES:
        _compare(setting, _losses(setting, 1, dtype, HOOKS, dtype), dtype)
    if setting.on_gpu and torch.cuda.device_count() > 1:
        two_gpus(setting)
    else:
        setting.needs_gpu("a second one, for assemble=collective over NCCL and contexts on another rank's GPU")


def two_gpus(setting: Setting) -> None:
    """What is gathered over NCCL, and that no rank has a context on another's GPU."""
    runs = {}
    for how in ("agent", "collective"):
        hooks = ";".join(f"{clause}@assemble={how}" for clause in ACTIVATIONS.split(";"))
        # What a rank prints at its end has the GPUs on which it has a context.
        runs[how] = str(_losses(setting, 2, "bfloat16", hooks, how).path)
    # What was gathered over NCCL is what the agent puts together.
    print(setting.job([setting.flexmodel, "certify", *runs.values(), "--exact"]).out)
