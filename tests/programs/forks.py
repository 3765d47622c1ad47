"""Forks in the middle of training; the child uses the model and leaves by os._exit."""

import os

import tiny
import torch


def step(model, optimizer, number: int) -> None:
    tokens, targets = tiny.batch(number, [4], 0)
    loss = tiny.loss_of(model(tokens), targets)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    tiny.report(0, number, loss)


def main() -> None:
    torch.set_num_threads(1)
    model = tiny.build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step(model, optimizer, 0)
    child = os.fork()
    if child == 0:
        with torch.no_grad():
            model(tiny.batch(9, [4], 0)[0])
        os._exit(3)
    _, status = os.waitpid(child, 0)
    print("child", os.waitstatus_to_exitcode(status), flush=True)
    step(model, optimizer, 1)
    os._exit(4)


if __name__ == "__main__":
    main()
