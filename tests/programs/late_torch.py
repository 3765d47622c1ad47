"""Forks before torch is there; the child, or the parent, is the one that trains: `late_torch.py child|parent`."""

import os
import sys


def train() -> None:
    import plain

    plain.main(steps=1)


def main(who: str) -> None:
    child = os.fork()
    if (child == 0) == (who == "child"):
        train()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)


if __name__ == "__main__":
    main(sys.argv[1])
