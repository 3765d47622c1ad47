"""Trains, and on the way closes every descriptor that it does not know and opens files of its own on all numbers below
1024, as daemons do: `closing.py FOLDER PHASES`.

A phase begins when FOLDER/goN is there. In it all these numbers are the program's: regular files, pipes and sockets in
turn. Then come a training step, and a look whether all of them are as they were left.
"""

import os
import pathlib
import socket
import sys
import time

import tiny
import torch

WORD = b"the job's own"


class Own:
    """The program's files, on every number."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        os.closerange(3, 65536)
        self.reading, writing = os.pipe()
        near, far = socket.socketpair()
        os.write(writing, WORD)
        far.send(WORD)
        self.near, self.far = near.detach(), far.detach()
        self.numbers = range(max(self.reading, writing, self.near, self.far) + 1, 1024)
        for number in self.numbers:
            if number % 3 == 0:
                self._regular(number)
            else:
                os.dup2(self.near if number % 3 == 1 else self.reading, number)

    def _regular(self, number: int) -> None:
        path = self.folder / str(number)
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        os.write(opened, WORD)
        if opened != number:
            os.dup2(opened, number)
            os.close(opened)

    def look(self) -> str:
        """What is not as it was left."""
        wrong = []
        for number in self.numbers:
            try:
                os.fstat(number)
            except OSError:
                wrong.append(f"{number} was closed")
        for path in self.folder.iterdir():
            if path.name.isdigit() and path.read_bytes() != WORD:
                wrong.append(f"{path.name} was written to: {path.read_bytes()[:80]!r}")
        ends = [("pipe", self.reading, WORD), ("socket", self.near, WORD), ("peer", self.far, b"")]
        for name, number, expected in ends:
            found = _all_of(number)
            if found != expected:
                wrong.append(f"the {name} has {found[:80]!r}")
        return "; ".join(wrong) or "intact"


def _all_of(number: int) -> bytes:
    os.set_blocking(number, False)
    found = b""
    while True:
        try:
            piece = os.read(number, 1 << 16)
        except BlockingIOError:
            return found
        if not piece:
            return found
        found += piece


def main(folder: pathlib.Path, phases: int) -> None:
    torch.set_num_threads(1)
    model = tiny.build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    steps = iter(range(1_000_000))

    def train(count: int, pause: float = 0.0) -> None:
        for _ in range(count):
            step = next(steps)
            tokens, targets = tiny.batch(step % 4, [4], 0)
            loss = tiny.loss_of(model(tokens), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            tiny.report(0, step, loss)
            time.sleep(pause)

    for phase in range(phases):
        while not (folder / f"go{phase}").exists():
            time.sleep(0.02)
        own = Own(folder)
        train(1)
        print(f"phase {phase}: {own.look()}", flush=True)
        os.closerange(3, 65536)
        # Twice as long as it takes until an agent is looked for again.
        train(10, 0.1)
        print(f"after {phase}", flush=True)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), int(sys.argv[2]))
