"""Starts the ranks of a job on this machine as torchrun does, in a moment: `launcher.py COUNT PROGRAM [ARGUMENT]...`.

torchrun imports torch before it starts anything, a fifth of what a small job costs. Tests of what torchrun does itself,
and one test of each framework at least, start real ones.
"""

import os
import random
import signal
import socket
import sys
import uuid

PATIENCE = 30
"""Seconds that ranks have to end in once another has failed, as under torchrun."""


def launch(count: int) -> int | None:
    """Forks `count` processes and returns None in each, with a rank's environment; here the exit code, at the end.

    When a rank fails the others are told to end.
    """
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "ROLE_WORLD_SIZE": str(count),
        "GROUP_WORLD_SIZE": "1",
        "GROUP_RANK": "0",
        "ROLE_NAME": "default",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "0",
        "TORCHELASTIC_RUN_ID": uuid.uuid4().hex,
    }
    left: dict[int, int] = {}
    for rank in range(count):
        pid = os.fork()
        if pid == 0:
            os.environ.update(common, RANK=str(rank), LOCAL_RANK=str(rank), ROLE_RANK=str(rank))
            return None
        left[pid] = rank

    def end_all(number: int, _frame=None) -> None:
        for pid in left:
            os.kill(pid, number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, end_all)
    signal.signal(signal.SIGALRM, lambda *_: end_all(signal.SIGKILL))
    failed = False
    while left:
        pid, status = os.wait()
        rank, code = left.pop(pid), os.waitstatus_to_exitcode(status)
        if code and not failed:
            failed = True
            print(f"launcher: rank {rank} ended with {code}", file=sys.stderr)
            end_all(signal.SIGTERM)
            signal.alarm(PATIENCE)
    return int(failed)


def _free_port() -> int:
    """Below those that the system gives to whoever asks for any."""
    while True:
        port = random.randrange(10_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port


if __name__ == "__main__":
    code = launch(int(sys.argv[1]))
    if code is not None:
        sys.exit(code)
    os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
