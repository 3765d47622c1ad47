"""Trains in one process as `plain.py` does, by an optimizer that is given a closure."""

import tiny
import torch

STEPS = 3
ROWS = 4


def main() -> None:
    model = tiny.build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(STEPS):
        tokens, targets = tiny.batch(step, [ROWS], 0)

        def closure(tokens=tokens, targets=targets):
            loss = tiny.loss_of(model(tokens), targets)
            optimizer.zero_grad()
            loss.backward()
            return loss

        tiny.report(0, step, optimizer.step(closure))


if __name__ == "__main__":
    main()
