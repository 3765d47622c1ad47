"""A job that closes descriptors which it does not know, that may not make some, or whose socket is another user's."""

import contextlib
import ctypes
import json
import os
import pathlib
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile

import flexmodel
import pytest

import harness

PHASES = 3
NOBODY = 65534


def _few_descriptors() -> None:
    """So many that ours, from 7/8 of them on, begin among those that the program takes, and some are left."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (1100, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


class Closing:
    """closing.py under the preload."""

    def __init__(self, folder: pathlib.Path, socket: pathlib.Path):
        self.folder = folder
        self.folder.mkdir()
        argv = harness.python("closing.py", str(folder), str(PHASES))
        self.job = harness.Job(argv, harness.preloaded("lm_head:forward", socket), preexec=_few_descriptors)

    def phase(self, number: int) -> None:
        """Lets the next one happen."""
        (self.folder / f"go{number}").touch()
        self.job.wait_for_line(f"after {number}")


def _accounted(out: pathlib.Path, outcome: harness.Outcome) -> set[int]:
    """The steps that were captured. Every other one is counted as dropped."""
    run = flexmodel.open(out)
    steps = {record.step for record in run.records}
    assert len(steps) + run.info.totals.dropped == len(outcome.losses), (sorted(steps), run.info.totals)
    return steps


def _left_alone(outcome: harness.Outcome) -> None:
    looks = [line for line in outcome.out.splitlines() if line.startswith("phase ")]
    assert looks == [f"phase {n}: intact" for n in range(PHASES)]


def test_a_job_that_takes_all_numbers_for_its_own_files_finds_them_as_it_left_them(tmp_path):
    out, socket = tmp_path / "x", tmp_path / "s"
    with harness.agent(out, socket), contextlib.ExitStack() as stack:
        closing = Closing(tmp_path / "own", socket)
        stack.enter_context(closing.job)
        for number in range(PHASES):
            closing.phase(number)
        outcome = closing.job.wait().expect(0)
    _left_alone(outcome)
    assert "flexmodel: rank 0: taps are off" not in outcome.err, outcome.text
    steps = _accounted(out, outcome)
    assert {10, 21, 32} <= steps, "captures do not go on after a phase"


def test_another_agent_gets_the_captures_of_a_job_that_has_closed_our_descriptors(tmp_path):
    out, socket = tmp_path / "x", tmp_path / "s"
    with contextlib.ExitStack() as stack:
        with harness.agent(out, socket) as agent:
            closing = Closing(tmp_path / "own", socket)
            stack.enter_context(closing.job)
            closing.phase(0)
            agent.process.send_signal(signal.SIGKILL)
            agent.process.wait()
        # Nobody is there: what is captured waits in a slab whose descriptor goes.
        closing.phase(1)
        with harness.agent(out, socket):
            closing.phase(2)
            outcome = closing.job.wait().expect(0)
    _left_alone(outcome)
    steps = _accounted(out, outcome)
    assert 10 in steps and 32 in steps, sorted(steps)


UNIX = 1
"""The family of unix sockets; others stay allowed."""

SYSCALLS = {"memfd_create": (319, None), "socket": (41, UNIX), "sendmsg": (46, None)}


def _without(name: str):
    """To be called in the job before it starts: this system call is refused to it, by a seccomp filter."""
    number, argument = SYSCALLS[name]

    def statement(code: int, yes: int, no: int, value: int) -> bytes:
        return struct.pack("HBBI", code, yes, no, value)

    load, equal, answer = 0x20, 0x15, 0x06
    allow, eperm = 0x7FFF0000, 0x00050001
    if argument is None:
        filters = [statement(load, 0, 0, 0), statement(equal, 0, 1, number)]
    else:
        filters = [
            statement(load, 0, 0, 0), statement(equal, 0, 3, number),
            statement(load, 0, 0, 16), statement(equal, 0, 1, argument),
        ]  # fmt: skip
    code = b"".join([*filters, statement(answer, 0, 0, eperm), statement(answer, 0, 0, allow)])

    def install() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        program = ctypes.create_string_buffer(code)
        filled = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(program))
        no_new_privileges, set_seccomp, mode_filter = 38, 22, 2
        if libc.prctl(no_new_privileges, 1, 0, 0, 0) or libc.prctl(set_seccomp, mode_filter, filled, 0, 0):
            raise OSError(ctypes.get_errno(), "no seccomp filter")

    return install


@pytest.mark.parametrize(
    ("name", "line", "in_the_run"),
    [
        ("memfd_create", "this process may not make shared memory (memfd_create: ", True),
        ("socket", "(socket): Operation not permitted", False),
        ("sendmsg", "no shared memory can be sent to the agent (sendmsg): Operation not permitted", True),
    ],
)
def test_what_a_filter_forbids_is_said_once_and_the_job_goes_on(name, line, in_the_run, tmp_path, untapped_once):
    out, socket = tmp_path / "x", tmp_path / "s"
    with harness.agent(out, socket):
        env = harness.preloaded("lm_head:forward", socket)
        outcome = harness.run(harness.python("plain.py"), env, preexec=_without(name)).expect(0)
    assert outcome.losses == untapped_once(harness.python("plain.py")).losses
    ours = [said for said in outcome.err.splitlines() if said.startswith("flexmodel:")]
    assert len(ours) == 1 and line in ours[0], outcome.text
    notices = flexmodel.open(out).info.notices
    assert any(line in notice for notice in notices) == in_the_run, notices


LISTENER = """
import json, os, select, socket, sys
user = int(sys.argv[2])
os.setgroups([])
os.setgid(user)
os.setuid(user)
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()
print("listening", flush=True)
heard = {"connections": 0, "bytes": 0, "descriptors": 0}
listener.settimeout(1)
while not select.select([sys.stdin], [], [], 0)[0]:
    try:
        peer, _ = listener.accept()
    except TimeoutError:
        continue
    heard["connections"] += 1
    peer.settimeout(5)
    while True:
        data, ancillary, _, _ = peer.recvmsg(65536, socket.CMSG_SPACE(64))
        heard["descriptors"] += len(ancillary)
        heard["bytes"] += len(data)
        if not data:
            break
print(json.dumps(heard), flush=True)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user; interposer's own tests hold it elsewhere")
@pytest.mark.parametrize("hooks", ["lm_head:forward", "a:b:c@@|"], ids=["captures", "last-words"])
def test_another_users_listener_gets_nothing_and_is_named_once(hooks, untapped_once):
    folder = pathlib.Path(tempfile.mkdtemp(prefix="flexmodel-open-"))
    folder.chmod(0o777)
    try:
        listener = subprocess.Popen(
            [sys.executable, "-c", LISTENER, str(folder / "s"), str(NOBODY)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert listener.stdout.readline() == "listening\n"
        outcome = harness.run(harness.python("plain.py"), harness.preloaded(hooks, folder / "s")).expect(0)
        answer, _ = listener.communicate("end\n", timeout=harness.TIMEOUT)
    finally:
        shutil.rmtree(folder)
    heard = json.loads(answer)
    assert (heard["bytes"], heard["descriptors"]) == (0, 0), heard
    assert outcome.losses == untapped_once(harness.python("plain.py")).losses
    ours = [line for line in outcome.err.splitlines() if line.startswith("flexmodel:")]
    assert len(ours) == 1, outcome.text
    if hooks == "lm_head:forward":
        assert heard["connections"] == 1, "it was asked again"
        assert f"user {NOBODY} listens at {folder / 's'}" in ours[0]
