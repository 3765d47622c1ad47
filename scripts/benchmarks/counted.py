"""Calls a module under callgrind, N and then 2 N times, and dumps the instruction counts of both.

    valgrind --tool=callgrind --instr-atstart=no ... python counted.py REQUESTS.so
"""

import ctypes
import gc
import sys

import torch
from torch import nn

N = 200


class Model(nn.Module):
    """A module that a hook may select, beside one that none does."""

    def __init__(self) -> None:
        super().__init__()
        self.selected = nn.Identity()
        self.other = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.other(x)


def call(module: nn.Module, x: torch.Tensor, times: int) -> None:
    for _ in range(times):
        module(x)


def main() -> None:
    requests = ctypes.PyDLL(sys.argv[1])
    model, x = Model(), torch.ones(1)
    model(x)
    other = model.other
    call(other, x, 2000)  # the interpreter has specialised its instructions by then
    gc.disable()
    requests.begin()
    for times in (N, 2 * N):
        requests.zero()
        call(other, x, times)
        requests.dump(str(times).encode())
    requests.end()


if __name__ == "__main__":
    main()
