"""Trains in one process, without torch.distributed, on batches of `rows`."""

import sys

import tiny
import torch


def main(steps: int = 3, rows: int = 4) -> None:
    model = tiny.build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(steps):
        tokens, targets = tiny.batch(step, [rows], 0)
        loss = tiny.loss_of(model(tokens), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        tiny.report(0, step, loss)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
