"""Trains and times its steps: `timed.py WIDTH DEPTH TOKENS STEPS cuda|cpu`. Prints one line of JSON.

On a GPU a step's time is from its first kernel to that of the next step, by events on the job's own stream that are
read at the end: what stalls the host counts, copies that leave the device beside the job do not, and nothing waits for
the whole device. `step` has these, `host` what the host took for each step, both in seconds, and `peak` the most bytes
that torch's allocator had in use in it.
"""

import itertools
import json
import sys
import time

import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(self.norm(x))


class Net(nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(width) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Clock:
    """The time by the host, in place of an event, where there is no device."""

    def __init__(self) -> None:
        self._at = 0.0

    def record(self) -> None:
        self._at = time.perf_counter()

    def elapsed_time(self, end: "Clock") -> float:
        """Milliseconds, as an event of torch's has it."""
        return (end._at - self._at) * 1e3


def main(width: int, depth: int, tokens: int, steps: int, device: str) -> None:
    on_gpu = device == "cuda"
    torch.manual_seed(0)
    model = Net(width, depth).to(device, torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    x = torch.randn(tokens, width, device=device, dtype=torch.bfloat16)
    marks = [torch.cuda.Event(enable_timing=True) if on_gpu else Clock() for _ in range(steps + 1)]
    host, peak = [], []
    for step in range(steps):
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        marks[step].record()
        start = time.perf_counter()
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        host.append(time.perf_counter() - start)
        peak.append(torch.cuda.max_memory_allocated() if on_gpu else 0)
    marks[steps].record()
    if on_gpu:
        torch.cuda.current_stream().synchronize()
    took = [begin.elapsed_time(end) / 1e3 for begin, end in itertools.pairwise(marks)]
    print(json.dumps({"step": took, "host": host, "peak": peak}))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:5]), sys.argv[5])
