"""Modules whose outputs are known without a reference: `known.py reuse|streams STEPS cuda|cpu`.

What each module gives is overwritten at once, in place, and so is memory that was freed a moment ago: a copy that is
made too late has -1 or -2 in it. With `streams` the modules run on three streams in turn.
"""

import sys

import torch
from torch import nn

OUTPUTS = [
    (1, "float32", "plain"),
    (1_000, "float32", "plain"),
    (65_536, "float32", "plain"),
    (300_001, "float32", "plain"),
    (1_400_000, "float32", "plain"),  # in pieces where a slab has 8 MiB
    (1_000, "int64", "plain"),
    (4_097, "bfloat16", "plain"),
    (150_000, "float32", "transposed"),
    (513, "complex64", "conjugate"),
]
"""Elements, type and form of what module `make.N` gives."""


def value(ramp: torch.Tensor, number: int, factor: float) -> torch.Tensor:
    """What module `make.NUMBER` makes of 0, 1, 2, ...: every operation is exact, or rounded alike everywhere."""
    _, dtype, form = OUTPUTS[number]
    out = (ramp * factor + number).to(getattr(torch, dtype))
    if form == "transposed":
        return out.view(-1, 300).t()
    return out.conj() if form == "conjugate" else out


def ramps(device: str) -> list[torch.Tensor]:
    """The modules' inputs."""
    return [torch.arange(size, device=device, dtype=torch.float32) for size, *_ in OUTPUTS]


class Make(nn.Module):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def forward(self, ramp: torch.Tensor, factor: float) -> torch.Tensor:
        return value(ramp, self.number, factor)


class Net(nn.Module):
    def __init__(self, device: str, streams: int) -> None:
        super().__init__()
        self.make = nn.ModuleList(Make(number) for number in range(len(OUTPUTS)))
        self.weight = nn.Parameter(torch.zeros((), device=device))
        self.streams = [torch.cuda.Stream() for _ in range(streams)]

    def forward(self, ramps: list[torch.Tensor], factor: float) -> torch.Tensor:
        total = self.weight * 0
        for number, make in enumerate(self.make):
            stream = self.streams[number % len(self.streams)] if self.streams else None
            if stream is None:
                total = total + self._last(make, ramps[number], factor)
                continue
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                last = self._last(make, ramps[number], factor)
            torch.cuda.current_stream().wait_stream(stream)
            last.record_stream(torch.cuda.current_stream())
            total = total + last
        return total

    @torch.no_grad()
    def _last(self, make: Make, ramp: torch.Tensor, factor: float) -> torch.Tensor:
        out = make(ramp, factor)
        last = out.flatten()[-1].real.float()
        out.fill_(-1)  # after the module returned it
        shape, dtype = out.shape, out.dtype
        del out
        torch.full(shape, -2, dtype=dtype, device=ramp.device)  # where it was
        return last


def main(case: str, steps: int, device: str) -> None:
    net = Net(device, 3 if case == "streams" and device == "cuda" else 0)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    given, losses = ramps(device), []
    for step in range(steps):
        loss = net(given, float(step + 1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    for step, loss in enumerate(losses):
        print(f"step {step} loss {loss.item().hex()}")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
