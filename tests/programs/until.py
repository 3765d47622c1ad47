"""Trains until a file appears, as scripts with an early-stop switch do: `until.py STOP [WIDTH]`."""

import itertools
import pathlib
import sys
import time
from collections.abc import Iterator

import tiny
import torch


def losses(width: int = tiny.WIDTH) -> Iterator[torch.Tensor]:
    """One for each step, for ever."""
    model = tiny.build(width=width)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in itertools.count():
        tokens, targets = tiny.batch(step % 4, [4], 0)
        loss = tiny.loss_of(model(tokens), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss


def main(stop: str, width: int = tiny.WIDTH) -> None:
    torch.set_num_threads(1)
    for step, loss in enumerate(losses(width)):
        tiny.report(0, step, loss)
        if pathlib.Path(stop).exists():
            break
        time.sleep(0.02)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
