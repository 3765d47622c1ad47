"""Mixture of experts, two of four on each of two ranks, tokens sent to them by all_to_all; data parallel otherwise:
`moe.py NAMES...`, one by one. A rank's experts are named by their numbers in the whole (`global`) or here (`local`).

In step 0 the last expert gets no token from anywhere, and is not called.
"""

import sys

import parallel
import tiny
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.nn.functional import all_to_all_single

STEPS = 2
EXPERTS = 4
SIZES = (4, 4)


class Moe(nn.Module):
    """Sends every token to one expert; `bias` steers the choice and nothing else."""

    def __init__(self, width: int):
        super().__init__()
        self.router = nn.Linear(width, EXPERTS)
        self.experts = nn.ModuleDict({str(n): tiny.Mlp(width) for n in range(EXPERTS)})
        self.register_buffer("bias", torch.zeros(EXPERTS))

    def forward(self, x):
        tokens = x.flatten(0, 1)
        weights = self.router(tokens).softmax(-1)
        chosen = (weights + self.bias).argmax(-1)
        order = chosen.argsort(stable=True)
        sent = chosen.bincount(minlength=EXPERTS)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent)  # for every rank and every expert here, how many tokens
        per_rank = [counts.view(dist.get_world_size(), -1).sum(1).tolist() for counts in (sent, received)]
        there = tokens.new_empty(sum(per_rank[1]), x.shape[-1])
        there = all_to_all_single(there, tokens[order], per_rank[1], per_rank[0])
        back = self.compute(there, received.view(dist.get_world_size(), -1))
        here = all_to_all_single(torch.empty_like(tokens), back, per_rank[0], per_rank[1])
        here = here[order.argsort()] * weights.gather(-1, chosen[:, None])
        return here.view_as(x)

    def compute(self, tokens, counts):
        """The experts of this rank on what came, in the order it came in; `counts` are by rank and expert."""
        expert = torch.arange(len(self.experts)).repeat(len(counts)).repeat_interleave(counts.flatten())
        result = torch.zeros_like(tokens)
        for index, module in enumerate(self.experts.children()):
            rows = (expert == index).nonzero().flatten()
            if len(rows):
                result = result.index_copy(0, rows, module(tokens[rows]))
        return result


def build(rank: int = 0, ranks: int = 1) -> tiny.Net:
    """The model with those experts that `rank` has."""
    model = tiny.build()
    model.layers[1].mlp = Moe(tiny.WIDTH)
    experts, share = model.layers[1].mlp.experts, EXPERTS // ranks
    for name in list(experts):
        if int(name) // share != rank:
            del experts[name]
    return model


def steer(model: tiny.Net, step: int) -> None:
    """Keeps all tokens from the last expert in step 0, and sends it more than its share later."""
    model.layers[1].mlp.bias[-1] = -1.0 if step == 0 else 0.2


def train(names: str) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    model = build(rank, world)
    if names == "local":
        model.layers[1].mlp.experts = nn.ModuleList(model.layers[1].mlp.experts.values())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(STEPS):
        steer(model, step)
        tokens, targets = tiny.batch(step, list(SIZES), rank)
        loss = tiny.loss_of(model(tokens), targets)
        optimizer.zero_grad()
        loss.backward()
        for name, parameter in model.named_parameters():
            if ".experts." not in name:
                dist.all_reduce(parameter.grad)
            if parameter.grad is not None:
                parameter.grad /= world
        optimizer.step()
        parallel.report(step, loss, world)


def main(*names: str) -> None:
    for each in names:
        train(each)


if __name__ == "__main__":
    parallel.launch(main, *sys.argv[1:])
