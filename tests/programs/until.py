"""Trains until a file appears, as scripts with an early-stop switch do: `until.py STOP [WIDTH]`."""

import pathlib
import sys
import time

import tiny
import torch


def main(stop: str, width: int = tiny.WIDTH) -> None:
    torch.set_num_threads(1)
    model = tiny.build(width=width)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = 0
    while not pathlib.Path(stop).exists():
        tokens, targets = tiny.batch(step % 4, [4], 0)
        loss = tiny.loss_of(model(tokens), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        tiny.report(0, step, loss)
        step += 1
        time.sleep(0.02)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
