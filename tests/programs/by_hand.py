"""Two ranks whose script does all communication itself, and wraps the model in nothing: `by_hand.py HOW...`.

tensor  both are given the same batch, and have half of every MLP each
data    each is given its own rows of the batch, and gradients are averaged
"""

import sys

import parallel
import tiny
import torch
import torch.distributed as dist
from torch import nn

STEPS = 2
ROWS = 4


class Copied(torch.autograd.Function):
    """The same on all ranks; each has its addend of the gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad


class Summed(torch.autograd.Function):
    """The sum over all ranks."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad


class HalfMlp(nn.Module):
    """A rank's share of an MLP: half of the hidden features."""

    def __init__(self, mlp: tiny.Mlp):
        super().__init__()
        rank, world = dist.get_rank(), dist.get_world_size()
        self.up, self.act, self.down = mlp.up, mlp.act, mlp.down
        self.up.weight.data = mlp.up.weight.data.chunk(world)[rank].clone()
        self.up.bias.data = mlp.up.bias.data.chunk(world)[rank].clone()
        self.down.weight.data = mlp.down.weight.data.chunk(world, 1)[rank].clone()
        self.down.bias.data = mlp.down.bias.data / world

    def forward(self, x):
        return Summed.apply(self.down(self.act(self.up(Copied.apply(x)))))


def train(how: str) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    model = tiny.build()
    if how == "tensor":
        for layer in model.layers:
            layer.mlp = HalfMlp(layer.mlp)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(STEPS):
        tokens, targets = tiny.batch(step, [ROWS], 0) if how == "tensor" else tiny.batch(step, [ROWS] * world, rank)
        loss = tiny.loss_of(model(tokens), targets)
        optimizer.zero_grad()
        loss.backward()
        for parameter in model.parameters() if how == "data" else ():
            dist.all_reduce(parameter.grad)
            parameter.grad /= world
        if how == "tensor":  # its bias is added once on each rank
            for layer in model.layers:
                dist.all_reduce(layer.mlp.down.bias.grad)
                layer.mlp.down.bias.grad /= world**2
        optimizer.step()
        parallel.report(step, loss, world)


def main(*ways: str) -> None:
    for how in ways:
        train(how)


if __name__ == "__main__":
    parallel.launch(main, *sys.argv[1:])
