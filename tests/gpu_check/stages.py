"""The stages, in their order: what the later ones stand on comes first, and what is measured comes last."""

from __future__ import annotations

from . import cost, graphs, machine, training, values
from .runner import Stage

ALL = [
    Stage("facts", 60, machine.facts, "the machine, its torch, and whether FlexModel works there"),
    Stage("probe", 60, machine.probe, "threads, capture modes and pinned memory, by the driver alone"),
    Stage("captures", 90, machine.captures, "what breaks a CUDA graph that is being captured"),
    Stage("reuse5", 60, values.reuse5, "tensors whose memory is overwritten and reused at once"),
    Stage("reuse", 90, values.reuse, "the same with a slab that fills, and tensors in pieces"),
    Stage("streams", 90, values.streams, "the same on three streams"),
    Stage("graph", 90, graphs.beside, "taps inside of and beside a CUDA graph that the job captures"),
    Stage("graphed", 90, graphs.callables, "torch.cuda.make_graphed_callables of a module with taps"),
    Stage("reduce-overhead", 180, graphs.compiled, "CUDA graphs that torch.compile makes"),
    Stage("small-taps", 60, cost.small_taps, "microseconds of the host for a tap"),
    Stage("one-layer", 60, cost.one_layer, "a load below what an agent stores"),
    Stage("all-drop", 90, cost.all_drop, "taps alone, of every layer"),
    Stage("all-wait", 120, cost.all_wait, "GB/s where the job waits for the agent"),
    Stage("nccl", 60, machine.nccl, "NCCL's own answers, with one rank"),
    Stage("gpu-check", 240, training.training, "training under FSDP2: losses and tensors, bit by bit"),
    Stage("sanitizer", 120, values.sanitizer, "compute-sanitizer's memcheck of a tapped job"),
]
