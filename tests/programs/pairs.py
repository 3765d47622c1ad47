"""Tensor parallelism by hand, in pairs of autograd functions as Megatron-LM has them: `pairs.py CASES...`, one by one,
on four ranks of which each two neighbours share a batch.

`unnamed`: process groups of which nothing says what they are for. `named`: those of a mesh with names. `sequence`: the
same, with pieces of sequences between the layers that are cut.
"""

import sys

import parallel
import tiny
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

STEPS = 2
ROWS = 4
TENSOR = 2


def through(there, back):
    """A function of autograd that does `there`, and `back` to its gradient, each over a group."""

    class Through(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, group):
            ctx.group = group
            return there(x, group)

        @staticmethod
        def backward(ctx, gradient):
            return back(gradient, ctx.group), None

    return Through


def same(x, group):
    return x


def summed(x, group):
    x = x.contiguous()
    dist.all_reduce(x, group=group)
    return x


def gathered(x, group):
    pieces = [torch.empty_like(x) for _ in range(TENSOR)]
    dist.all_gather(pieces, x.contiguous(), group=group)
    return torch.cat(pieces, 1)


def own_piece(x, group):
    return x.chunk(TENSOR, 1)[dist.get_rank(group)].contiguous()


def reduced_piece(x, group):
    return own_piece(summed(x, group), group)


# f and g, around layers that are cut.
Copy, Reduce = through(same, summed), through(summed, same)
# The same, where between them each rank has a piece of the sequence.
Gather, ReduceScatter = through(gathered, reduced_piece), through(reduced_piece, gathered)
# To pieces of the sequence, and back.
Scatter, Whole = through(own_piece, gathered), through(gathered, own_piece)


class Mlp(nn.Module):
    """Columns of the first matrix, and rows of the second."""

    def __init__(self, group, begin, end):
        super().__init__()
        self.group, self.begin, self.end = group, begin, end
        share = 4 * tiny.WIDTH // (1 if group is None else TENSOR)
        self.up = nn.Linear(tiny.WIDTH, share, bias=False)
        self.act = nn.GELU()
        self.down = nn.Linear(share, tiny.WIDTH, bias=False)

    def forward(self, x):
        if self.group is None:
            return self.down(self.act(self.up(x)))
        return self.end.apply(self.down(self.act(self.up(self.begin.apply(x, self.group)))), self.group)


class Net(nn.Module):
    def __init__(self, group=None, pieces: bool = False):
        super().__init__()
        self.group, self.pieces = group, pieces
        self.embed = nn.Embedding(tiny.VOCAB, tiny.WIDTH)
        self.norm = nn.LayerNorm(tiny.WIDTH)
        self.mlp = Mlp(group, *((Gather, ReduceScatter) if pieces else (Copy, Reduce)))
        self.lm_head = nn.Linear(tiny.WIDTH, tiny.VOCAB, bias=False)

    def forward(self, tokens):
        x = self.embed(tokens)
        if self.pieces:
            x = Scatter.apply(x, self.group)
        x = x + self.mlp(self.norm(x))
        if self.pieces:
            x = Whole.apply(x, self.group)
        return self.lm_head(x)


def build(group=None, pieces: bool = False) -> Net:
    """The model, or what a rank of the group has of it."""
    torch.manual_seed(0)
    whole = Net()
    if group is None:
        return whole
    model, rank = Net(group, pieces), dist.get_rank(group)
    state = whole.state_dict()
    state["mlp.up.weight"] = state["mlp.up.weight"].chunk(TENSOR, 0)[rank].clone()
    state["mlp.down.weight"] = state["mlp.down.weight"].chunk(TENSOR, 1)[rank].clone()
    model.load_state_dict(state)
    return model


def train(case: str) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    shards = world // TENSOR
    if case == "unnamed":
        across = [dist.new_group(list(range(at, world, TENSOR))) for at in range(TENSOR)][rank % TENSOR]
        group = [dist.new_group([TENSOR * at, TENSOR * at + 1]) for at in range(shards)][rank // TENSOR]
    else:
        mesh = init_device_mesh("cpu", (shards, TENSOR), mesh_dim_names=("dp", "tp"))
        across, group = mesh["dp"].get_group(), mesh["tp"].get_group()
    model = build(group, case == "sequence")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(STEPS):
        tokens, targets = tiny.batch(step, [ROWS // shards] * shards, rank // TENSOR)
        loss = tiny.loss_of(model(tokens), targets)
        optimizer.zero_grad()
        loss.backward()
        for name, parameter in model.named_parameters():
            if case == "sequence" and name.startswith("norm"):
                dist.all_reduce(parameter.grad, group=group)
            dist.all_reduce(parameter.grad, group=across)
            parameter.grad /= shards
        optimizer.step()
        parallel.report(step, loss, world)


def main(*cases: str) -> None:
    for case in cases:
        train(case)


if __name__ == "__main__":
    parallel.launch(main, *sys.argv[1:])
