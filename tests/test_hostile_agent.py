"""Whoever listens at the socket may be anything: it costs the job its captures, and never more."""

import contextlib
import itertools
import mmap
import pathlib
import random
import re
import socket
import struct
import threading
import time
from collections.abc import Callable

import pytest

import harness
import reference_runs

WELCOME = b"\x01\0\0\0\0"
ESCAPES = "\x1b]0;mine\x07\x1b[2J\x1b[31m\r\n\n\x9b5A\x7f"
LONGEST_LINE = 5000
"""Bytes; a notice has 4096 at most."""
MOST_LINES = 30
"""What a link says of agents that come and go is bounded, and so is what else there is to say."""

Behaviour = Callable[["Visit"], None]


def question(number: int, code: int = 0) -> bytes:
    """The message in which an agent asks a rank something; 0 is for its plan, and there is no other."""
    body = b"\x02\xfc" + struct.pack("<I", number) + bytes([code])
    return struct.pack("<I", len(body)) + body


def refusal(why: bytes) -> bytes:
    """The message in which an agent refuses a rank."""
    body = b"\x01\xfc" + struct.pack("<I", len(why)) + why
    return struct.pack("<I", len(body)) + body


class Visit:
    """A connection of the job, as the agent has it."""

    def __init__(self, connection: socket.socket, over: threading.Event):
        self.connection = connection
        self.over = over
        self.slabs: list[mmap.mmap] = []
        self._random = random.Random(7)

    def read(self, seconds: float) -> None:
        """Takes what comes for so long."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and not self.over.is_set():
            self.connection.settimeout(left)
            with contextlib.suppress(TimeoutError):
                data, fds, _, _ = socket.recv_fds(self.connection, 1 << 16, 16)
                self._take(fds)
                if not data:
                    return

    def _take(self, fds: list[int]) -> None:
        for fd in fds:
            with contextlib.suppress(ValueError, OSError):
                self.slabs.append(mmap.mmap(fd, 0))
            # Closed by its number: it is ours alone.
            socket.close(fd)

    def say(self, data: bytes) -> None:
        """All of it, if the job takes it."""
        self.connection.settimeout(10)
        self.connection.sendall(data)

    def scribble(self, seconds: float, words: Callable[[], int]) -> None:
        """Writes over the headers of the job's slabs for so long."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self.over.is_set():
            for slab in self.slabs:
                for at in range(0, 256, 8):
                    struct.pack_into("<Q", slab, at, words())
            time.sleep(0.001)

    def any_word(self) -> int:
        """Numbers that break something, if anything does."""
        number = self._random.choice([0, 1, 63, 64, 4096, 1 << 20, 1 << 32, 1 << 63, (1 << 64) - 1, (1 << 64) - 64])
        return number if self._random.random() < 0.5 else self._random.getrandbits(64)


class HostileAgent:
    """Listens, and has each visitor served by the next behaviour; the last one again, once all have had their turn."""

    def __init__(self, path: pathlib.Path, behaviours: list[Behaviour]):
        self._behaviours = behaviours
        self._over = threading.Event()
        self._served = 0
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen(16)
        self._listener.settimeout(0.1)
        self._thread = threading.Thread(target=self._serve)

    @property
    def is_done(self) -> bool:
        """Whether every behaviour had its turn."""
        return self._served >= len(self._behaviours)

    def __enter__(self) -> "HostileAgent":
        self._thread.start()
        return self

    def __exit__(self, *_exc) -> None:
        self._over.set()
        self._thread.join()
        self._listener.close()

    def _serve(self) -> None:
        while not self._over.is_set():
            with contextlib.suppress(TimeoutError):
                connection, _ = self._listener.accept()
                behaviour = self._behaviours[min(self._served, len(self._behaviours) - 1)]
                # The job may leave at any moment.
                with connection, contextlib.suppress(ConnectionError, TimeoutError):
                    behaviour(Visit(connection, self._over))
                self._served += 1


def _after_a_welcome(*answers: bytes) -> Behaviour:
    def behave(visit: Visit) -> None:
        visit.say(WELCOME)
        for answer in answers:
            visit.say(answer)
        visit.read(0.2)

    return behave


def _silent(visit: Visit) -> None:
    """Takes a visitor in and never reads."""
    visit.say(WELCOME)
    visit.over.wait(4)


def _silent_after_questions(visit: Visit) -> None:
    """Asks, and never reads the answers."""
    visit.say(b"".join(question((1 << 20) + number) for number in range(5000)))
    visit.over.wait(2)


def _with_descriptors(visit: Visit) -> None:
    with open("/dev/null") as file:
        for _ in range(20):
            socket.send_fds(visit.connection, [WELCOME], [file.fileno()] * 50)
    visit.read(0.2)


def _scribbling(words: Callable[[Visit], Callable[[], int]]) -> Behaviour:
    def behave(visit: Visit) -> None:
        visit.say(WELCOME)
        visit.read(0.3)
        assert visit.slabs, "the job brought no slab"
        visit.scribble(0.5, words(visit))

    return behave


def _never_tired(visit: Visit) -> None:
    """Seems to live and to go on, and gives nothing back: every word of the header changes until the job ends.

    Every other one is a place in the ring, the rest are two counters each.
    """
    visit.say(WELCOME)
    visit.read(0.3)
    numbers = itertools.count()

    def word() -> int:
        turn, place = divmod(next(numbers), 256 // 8)
        count = turn % 4096
        return count << 32 | count if place % 2 else count * 64

    visit.scribble(harness.TIMEOUT, word)


def _refusing(visit: Visit) -> None:
    visit.read(0.3)
    visit.say(refusal((ESCAPES * 200).encode()))


GARBAGE = random.Random(5).randbytes(4096)
CASES: dict[str, list[Behaviour]] = {
    "words": [
        _after_a_welcome(GARBAGE),
        _after_a_welcome(b"\xff" * 16),
        _after_a_welcome(b"\0\0\0\x01", GARBAGE * 1000),  # 16 MiB that never come in full
        _after_a_welcome(WELCOME),
        _after_a_welcome(WELCOME * 10_000),
        *[_after_a_welcome(refusal(b"no")[:length]) for length in range(1, len(refusal(b"no")))],
        _after_a_welcome(refusal((ESCAPES * 600_000).encode())),
        _after_a_welcome(question(1 << 20) * 10_000),
        _after_a_welcome(question(1 << 20, code=9)),
        _after_a_welcome(*[question(1 << 20)[:length] for length in (5, 9)]),
        _silent,
        _silent_after_questions,
        _with_descriptors,
    ],
    "no-welcome": [lambda visit: visit.say(GARBAGE), lambda visit: None, lambda visit: visit.say(WELCOME[:4])],
    "refused": [_refusing],
    "memory": [
        _scribbling(lambda visit: visit.any_word),
        _scribbling(lambda visit: lambda: (1 << 64) - 1),
        _scribbling(lambda visit: lambda: 0),
        _scribbling(lambda visit: visit.any_word),
    ],
    "never-tired": [_never_tired],
}


@pytest.mark.parametrize("case", CASES)
def test_the_job_ends_as_it_would_without_it(case, tmp_path):
    stop, path = tmp_path / "stop", tmp_path / "agent.sock"
    # The slab is full at once.
    argv = harness.python("until.py", str(stop), "256")
    env = harness.preloaded("layers.*.mlp:forward,backward", path, FLEXMODEL_SLAB="1M")
    with HostileAgent(path, CASES[case]) as agent, harness.Job(argv, env) as job:
        if case == "never-tired":
            job.wait_for_line("step 0 ")
        else:
            harness.wait_until(lambda: agent.is_done, "the last behaviour's turn", job=job)
        if case == "refused":
            harness.wait_until(lambda: "refused this rank" in job.err, "the refusal", job=job)
        seen = job.out.count("\n")
        harness.wait_until(lambda: job.out.count("\n") > seen + 3, "another step", job=job)
        stop.touch()
        outcome = job.wait().expect(0)
    assert outcome.losses == reference_runs.until(len(outcome.losses), 256)
    assert re.fullmatch(r"(step \d+ loss \S+\n)+", outcome.out), outcome.out[:300]
    assert ("refused this rank" in outcome.err) == (case == "refused"), outcome.err[:3000]
    lines = outcome.err.splitlines()
    assert len(lines) <= MOST_LINES and all(line.startswith("flexmodel: ") for line in lines), outcome.err[:3000]
    assert max(map(len, lines), default=0) <= LONGEST_LINE
    assert outcome.err.replace("\n", "").isprintable(), "raw control characters"
