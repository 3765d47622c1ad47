"""megatron-core's tensor parallel layers, tensors [seq, batch, hidden]: `megatron_tp.py STYLE...`, one by one.

tensor    the residual stream is whole on every rank
sequence  it is sharded over the sequence between the parallel layers
"""

import math
import sys

import parallel
import tiny
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    vocab_parallel_cross_entropy,
)
from torch import nn

STEPS = 2
ROWS = 4


def start(weight: torch.Tensor) -> torch.Tensor:
    """Initial weights, the same in every layout: megatron draws the whole and takes a rank's part of it."""
    return nn.init.normal_(weight, std=0.1)


class Mlp(nn.Module):
    def __init__(self, width: int, config: ModelParallelConfig):
        super().__init__()
        options = {"config": config, "init_method": start, "bias": True, "skip_bias_add": False}
        self.up = ColumnParallelLinear(width, 4 * width, gather_output=False, **options)
        self.act = nn.GELU()
        self.down = RowParallelLinear(4 * width, width, input_is_parallel=True, **options)

    def forward(self, x):
        return self.down(self.act(self.up(x)[0]))[0]


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, config: ModelParallelConfig):
        super().__init__()
        self.size = width // heads
        options = {"config": config, "init_method": start, "bias": True, "skip_bias_add": False}
        self.qkv = ColumnParallelLinear(width, 3 * width, gather_output=False, **options)
        self.proj = RowParallelLinear(width, width, input_is_parallel=True, **options)

    def forward(self, x):
        # [seq, batch, heads, 3 * size]: a rank has whole heads, each with its queries, keys and values.
        q, k, v = self.qkv(x)[0].unflatten(-1, (-1, 3 * self.size)).permute(1, 2, 0, 3).chunk(3, -1)
        mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
        scores = (q @ k.transpose(-1, -2) / math.sqrt(self.size)).masked_fill(mask, float("-inf"))
        return self.proj((scores.softmax(-1) @ v).permute(2, 0, 1, 3).flatten(2))[0]


class Block(nn.Module):
    def __init__(self, width: int, heads: int, config: ModelParallelConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads, config)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, config)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Net(nn.Module):
    """`tiny.Net` in megatron's order; gives logits sharded over the vocabulary."""

    def __init__(self, config: ModelParallelConfig, layers: int = 2, width: int = tiny.WIDTH):
        super().__init__()
        self.embed = VocabParallelEmbedding(
            tiny.VOCAB, width, init_method=start, config=config, reduce_scatter_embeddings=config.sequence_parallel
        )
        self.layers = nn.ModuleList(Block(width, tiny.HEADS, config) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.lm_head = ColumnParallelLinear(
            width, tiny.VOCAB, config=config, init_method=start, bias=False, gather_output=False
        )

    def forward(self, tokens):
        x = self.embed(tokens)
        # With reduce_scatter_embeddings it comes as [seq, batch, hidden] already.
        x = x if self.embed.reduce_scatter_embeddings else x.transpose(0, 1).contiguous()
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))[0]


def build(sequence: bool = False) -> Net:
    """The model, as far as this rank has it; one process has all of it."""
    torch.manual_seed(0)
    model = Net(ModelParallelConfig(
        tensor_model_parallel_size=dist.get_world_size(), sequence_parallel=sequence, use_cpu_initialization=True
    ))  # fmt: skip
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.sequence_parallel = sequence
    return model


def loss_of(logits, targets):
    return vocab_parallel_cross_entropy(logits.float(), targets.transpose(0, 1).contiguous()).mean()


def train(style: str) -> None:
    model = build(style == "sequence")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(STEPS):
        tokens, targets = tiny.batch(step, [ROWS], 0)
        loss = loss_of(model(tokens), targets)
        optimizer.zero_grad()
        loss.backward()
        for parameter in model.parameters():
            if getattr(parameter, "sequence_parallel", False):
                dist.all_reduce(parameter.grad, group=parallel_state.get_tensor_model_parallel_group())
        optimizer.step()
        tiny.report(dist.get_rank(), step, loss)


def main(*styles: str) -> None:
    torch.cuda.current_device = lambda: torch.device("cpu")  # where megatron makes its buffers
    parallel_state.initialize_model_parallel(dist.get_world_size())
    for style in styles:
        train(style)
    parallel_state.destroy_model_parallel()


if __name__ == "__main__":
    parallel.launch(main, *sys.argv[1:])
