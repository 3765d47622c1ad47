"""A layer with very many submodules, called until a file appears: `experts.py STOP EXPERTS`."""

import pathlib
import sys
import time

import torch
from torch import nn


class Routed(nn.Module):
    def __init__(self, experts: int):
        super().__init__()
        self.experts = nn.ModuleDict({f"an_expert_with_a_long_name_{n}": nn.Linear(1, 1) for n in range(experts)})
        self.shared = nn.Linear(4, 4)

    def forward(self, x):
        return self.shared(x)


def main(stop: str, experts: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Routed(experts)
    step = 0
    while not pathlib.Path(stop).exists():
        print(f"step {step} loss {float(model(torch.ones(2, 4)).detach().sum()).hex()}", flush=True)
        step += 1
        time.sleep(0.01)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
