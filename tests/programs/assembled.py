"""Models put together in ways that tell nobody: lone modules, blocks inserted into lists, parts made by torch.jit:
`assembled.py HOW...`, one after another."""

import copy
import sys

import tiny
import torch
from torch import nn

WIDTH = 4


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.linear(x).tanh()


class Stack(nn.Module):
    """Takes blocks that were built before it; torch tells nobody of an inserted one."""

    def __init__(self, early):
        super().__init__()
        self.layers = nn.ModuleList([Block()])
        self.layers.insert(0, Block())
        self.layers.insert(1, early)
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def lone():
    body, head = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()), nn.Linear(WIDTH, 3)
    criterion = nn.CrossEntropyLoss()
    return nn.ModuleList([body, head]).parameters(), lambda x: criterion(head(body(x)), torch.tensor([0, 1, 2]))


def inserted():
    stack = Stack(Block())
    return stack.parameters(), lambda x: stack(x).square().mean()


def grown():
    """A block that ran alone becomes part of a model, which then gets another one before it."""
    early = Block()
    early(torch.ones(1, WIDTH))
    stack = Stack(early)
    stack(torch.ones(1, WIDTH))
    stack.layers.insert(0, Block())
    return stack.parameters(), lambda x: stack(x).square().mean()


def holding(make):
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), make(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())), Block())
    return model.parameters(), lambda x: model(x).square().mean()


def scripted():
    return holding(torch.jit.script)


def traced():
    return holding(lambda part: torch.jit.trace(part, torch.ones(1, WIDTH)))


def copied():
    """A tapped model and a copy of it, both compiled by torch.jit afterwards."""
    model = nn.Sequential(Block(), nn.Linear(WIDTH, WIDTH))
    model(torch.ones(1, WIDTH))
    both = [torch.jit.script(model), torch.jit.script(copy.deepcopy(model))]
    return model.parameters(), lambda x: sum(each(x).square().mean() for each in both)


class Agent(Block):
    """Has names of torch's for things of its own."""

    def __init__(self):
        super().__init__()
        self.modules = [self.linear]

    def parameters(self, group):
        return [parameter for module in self.modules for parameter in getattr(module, group).values()]


def overriding():
    agent, model = Agent(), nn.Sequential(nn.Linear(WIDTH, WIDTH))
    return agent.parameters("_parameters"), lambda x: model(agent(x)).square().mean()


def profiled():
    """A tool has a part in every call for a while; what it then puts back is what it found while nothing was called."""
    early = Block()
    found = nn.Module.__call__

    def timed(self, *args, **kwargs):
        return found(self, *args, **kwargs)

    nn.Module.__call__ = timed
    early(torch.ones(1, WIDTH))
    nn.Module.__call__ = found
    late = Block()
    return late.parameters(), lambda x: late(early(x)).square().mean()


def main(*ways: str) -> None:
    for how in ways:
        torch.manual_seed(0)
        parameters, loss_of = globals()[how]()
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        for step in range(2):
            loss = loss_of(torch.randn(3, WIDTH))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            tiny.report(0, step, loss)


if __name__ == "__main__":
    main(*sys.argv[1:])
