"""Runs a small model for some seconds and prints as its argument says: whole lines, halves of lines, a progress bar, no
end of the last line, or half a line before the model is called first."""

import sys
import time

import torch

LOSSES = ["4.1931", "3.0274", "2.5"]


def put(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
    time.sleep(0.7)


def main(how: str) -> None:
    model = torch.nn.Linear(4, 4)
    if how == "before":
        put("training ")
    for number, loss in enumerate(LOSSES):
        model(torch.ones(2, 4))
        if how == "halves":
            put(f"loss {loss[:3]}")
            put(f"{loss[3:]}\n")
        elif how == "bar":
            put(f"\r{'#' * (number + 1)}{'.' * (2 - number)} loss {loss:<6}")
        elif how == "unended" and loss == LOSSES[-1]:
            put(f"loss {loss}")
        else:
            put(f"loss {loss}\n")


if __name__ == "__main__":
    main(sys.argv[1])
