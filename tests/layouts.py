"""The jobs that several files ask about: each layout runs once, with hooks of every kind.

A program trains models one after another: each has a number in the run, and its steps follow those of the one before.
"""

import tiny
import torch

import captures
import harness

KINDS = "forward,forward_pre,backward,backward_pre"
HOOKS = f"**:{KINDS},param,grad"


def modules(model: torch.nn.Module) -> set[str]:
    """What is called in a model, and so has records; "" is the model itself."""
    return {name for name, module in model.named_modules() if not isinstance(module, torch.nn.ModuleList)}


MODULES = modules(tiny.build())

FSDP1 = harness.torchrun("fsdp1.py", "flat", "orig")
ZERO = harness.torchrun("zero.py", "1", "2", "3")
WRAPPED = {
    "ddp": (harness.torchrun("ddp.py"), 0),
    "fsdp1-flat": (FSDP1, 0),
    "fsdp1-orig": (FSDP1, 1),
    "fsdp2": (harness.torchrun("fsdp2.py"), 0),
    "zero1": (ZERO, 0),
    "zero2": (ZERO, 1),
    "zero3": (ZERO, 2),
    "accelerate": (harness.torchrun("accelerate_ddp.py"), 0),
}
"""Programs of two ranks that share batches, and the number of the model."""
STEPS = 3

TENSOR_PARALLEL = harness.torchrun("tensor_parallel.py", "local", "dtensor", "sequence")
REPLICAS = harness.on_ranks("hsdp.py", "fsdp1", "fsdp2", ranks=4)
CROSSED = harness.on_ranks("fsdp2_tp.py", "sequence", ranks=4)


def tensors(
    outcome: harness.Outcome, number: int = 0, steps: int = STEPS, parameters: bool = False
) -> dict[captures.Key, torch.Tensor]:
    """A model's activations and their gradients, or its parameters and theirs, with steps from 0 on."""
    return {
        key._replace(step=key.step - number * steps): value
        for key, value in captures.read(outcome.run, number).items()
        if (key.kind in ("param", "grad")) == parameters
    }
