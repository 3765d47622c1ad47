"""torch.compile of every block: `compiled.py BACKEND`."""

import sys

import tiny
import torch


def main(backend: str, steps: int = 3) -> None:
    torch.set_num_threads(1)
    model = tiny.build()
    for layer in model.layers:
        layer.compile(backend=backend)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(steps):
        tokens, targets = tiny.batch(step, [4], 0)
        loss = tiny.loss_of(model(tokens), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        tiny.report(0, step, loss)


if __name__ == "__main__":
    main(*sys.argv[1:])
