"""Tensor parallel by `parallelize_module`, every rank with the same batch: `tensor_parallel.py STYLE...`, one by one.

local     Megatron's split of attention, MLP, embedding and head; every module returns a local tensor
dtensor   the MLP and the head return DTensors: sharded (unevenly: 65 words), partial and replicated
sequence  the residual stream is sharded over the sequence, the head over the vocabulary, and so is the loss
"""

import contextlib
import math
import sys

import parallel
import tiny
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)

STEPS = 2
ROWS = 4


class Attention(nn.Module):
    """`tiny.Attention` with a projection each for queries, keys and values, and as many heads as those give it."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.size = width // heads
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        q, k, v = (y.unflatten(-1, (-1, self.size)).transpose(1, 2) for y in (self.q(x), self.k(x), self.v(x)))
        mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
        scores = (q @ k.transpose(-1, -2) / math.sqrt(self.size)).masked_fill(mask, float("-inf"))
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def build(style: str = "local") -> tiny.Net:
    """The whole model, as one process has it."""
    model = tiny.build(vocab=65 if style == "dtensor" else tiny.VOCAB)
    for layer in model.layers:
        layer.attn = Attention(tiny.WIDTH, tiny.HEADS)
    return model


def local_plan() -> dict:
    return {
        "embed": RowwiseParallel(input_layouts=Replicate()),
        **dict.fromkeys(["layers.*.attn.q", "layers.*.attn.k", "layers.*.attn.v"], ColwiseParallel()),
        "layers.*.attn.proj": RowwiseParallel(),
        "layers.*.mlp.up": ColwiseParallel(),
        "layers.*.mlp.down": RowwiseParallel(),
        "lm_head": ColwiseParallel(output_layouts=Replicate()),
    }


def dtensor_plan() -> dict:
    return {
        "layers.*.mlp": PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Replicate()),
        "layers.*.mlp.up": ColwiseParallel(use_local_output=False),
        "layers.0.mlp.down": RowwiseParallel(output_layouts=Partial(), use_local_output=False),
        "layers.1.mlp.down": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
        "lm_head": ColwiseParallel(use_local_output=False),
    }


def sequence_plan() -> dict:
    whole = {"input_layouts": Shard(1), "desired_input_layouts": Replicate()}
    return {
        "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "layers.*.norm1": SequenceParallel(),
        "layers.*.attn": PrepareModuleInput(**whole),
        **dict.fromkeys(["layers.*.attn.q", "layers.*.attn.k", "layers.*.attn.v"], ColwiseParallel()),
        "layers.*.attn.proj": RowwiseParallel(output_layouts=Shard(1)),
        "layers.*.norm2": SequenceParallel(),
        "layers.*.mlp": PrepareModuleInput(**whole),
        "layers.*.mlp.up": ColwiseParallel(),
        "layers.*.mlp.down": RowwiseParallel(output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "lm_head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Shard(-1), use_local_output=False),
    }


PLANS = {"local": local_plan, "dtensor": dtensor_plan, "sequence": sequence_plan}


def parallelize(model: tiny.Net, mesh: DeviceMesh, style: str = "local") -> tiny.Net:
    """Applies the plan of `style`."""
    parallelize_module(model, mesh, PLANS[style]())
    if style == "dtensor":
        layouts = {"desired_output_layouts": Replicate(), "use_local_output": True}
        for layer, given in zip(model.layers, (Partial(), Shard(1)), strict=True):
            parallelize_module(layer.mlp, mesh, PrepareModuleOutput(output_layouts=given, **layouts))
        parallelize_module(
            model, mesh, PrepareModuleOutput(output_layouts=Shard(-1), desired_output_layouts=Replicate())
        )
    return model


def loss_context(style: str):
    """Where the logits stay sharded over the vocabulary, so does the loss."""
    return loss_parallel() if style == "sequence" else contextlib.nullcontext()


def whole(loss: torch.Tensor) -> torch.Tensor:
    """The loss as every rank has it."""
    loss = loss.detach()
    return loss.full_tensor() if isinstance(loss, DTensor) else loss


def train(style: str) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    model = parallelize(build(style), mesh, style)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(STEPS):
        tokens, targets = tiny.batch(step, [ROWS], 0)
        with loss_context(style):
            loss = tiny.loss_of(model(tokens), targets)
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        tiny.report(dist.get_rank(), step, whole(loss))


def main(*args: str) -> None:
    for arg in args:
        train(arg)


if __name__ == "__main__":
    parallel.launch(main, *sys.argv[1:])
