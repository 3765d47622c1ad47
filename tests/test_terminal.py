"""What a person sees at a terminal: the job's text as it is without FlexModel, and whole lines of ours."""

import os
import pathlib
import pty
import select
import signal
import subprocess
import time

import pytest

import harness

OURS = "flexmodel: "


class Terminal:
    """A command that is at a terminal; with `err`, all but its stderr."""

    def __init__(self, argv: list[str], err: pathlib.Path | None = None):
        self._terminal, theirs = pty.openpty()
        with open(err or os.devnull, "wb") as file:
            self.process = subprocess.Popen(
                argv, env=harness.environment(), stdin=theirs, stdout=theirs, stderr=file if err else theirs,
                start_new_session=True,
            )  # fmt: skip
        os.close(theirs)
        self.written = ""

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_exc) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._terminal)

    def read(self, until: str | None = None) -> str:
        """All that is written, up to the end or until this text is there."""
        deadline = time.monotonic() + harness.TIMEOUT
        while until is None or until not in self.written:
            assert time.monotonic() < deadline, f"{until or 'its end'} never came\n{self.written}"
            if not select.select([self._terminal], [], [], 1)[0]:
                continue
            try:
                self.written += os.read(self._terminal, 4096).decode()
            except OSError:  # nobody has it open any more
                break
        return self.written


def screen(written: str) -> list[str]:
    """The lines that are seen in the end. What is none of the codes below would be seen as it is."""
    lines, column, at = [[]], 0, 0
    while at < len(written):
        if written.startswith("\x1b[K", at):
            del lines[-1][column:]
            at += 3
            continue
        character, row = written[at], lines[-1]
        at += 1
        if character == "\r":
            column = 0
        elif character == "\n":
            lines.append([])
        else:
            row.extend(" " * (column + 1 - len(row)))
            row[column] = character
            column += 1
    return ["".join(line).rstrip() for line in lines]


def job_and_ours(written: str) -> tuple[list[str], list[str]]:
    """The lines on the screen that are the job's, and those that are ours."""
    lines = [line for line in screen(written) if line]
    return [line for line in lines if not line.startswith(OURS)], [line for line in lines if line.startswith(OURS)]


def tapped(how: str, out: pathlib.Path, hooks: str = "(root):forward") -> list[str]:
    command = [harness.FLEXMODEL, "run", "--hooks", hooks, "--out", str(out), "--"]
    return [*command, *harness.python("printing.py", how)]


@pytest.mark.parametrize("how", ["lines", "halves", "bar", "unended"])
def test_the_jobs_text_is_as_it_is_without_us(how, tmp_path):
    with Terminal(harness.python("printing.py", how)) as untapped:
        alone, _ = job_and_ours(untapped.read())
    with Terminal(tapped(how, tmp_path / "x")) as job:
        written = job.read()
        assert job.process.wait(harness.TIMEOUT) == 0, written
    seen, ours = job_and_ours(written)
    assert seen == alone and any("loss 2.5" in line for line in seen), written
    assert any("3 records" in line for line in ours), written
    assert "\x1b" not in written
    assert written.count("\r") - written.count("\r\n") == (3 if how == "bar" else 0), "a line is written over"


def test_what_must_be_said_while_the_job_prints_is_a_line_of_its_own(tmp_path):
    with Terminal(tapped("lines", tmp_path / "x")) as job:
        job.read(until="loss 4.1931")
        os.kill(_agent(job.process.pid), signal.SIGKILL)
        written = job.read()
        assert job.process.wait(harness.TIMEOUT) == 0, written
    seen, ours = job_and_ours(written)
    assert [line for line in seen if line.startswith("loss")] == ["loss 4.1931", "loss 3.0274", "loss 2.5"], written
    said = f"{OURS}the agent was killed by signal 9; the job goes on, and what it captures from now on is lost"
    assert said in ours, written


def test_what_is_said_inside_of_the_job_is_a_line_of_its_own(tmp_path):
    with Terminal(tapped("before", tmp_path / "x", "(root):forward;no.such.module")) as job:
        written = job.read()
        assert job.process.wait(harness.TIMEOUT) == 0, written
    seen, ours = job_and_ours(written)
    assert seen[:2] == ["training", "loss 4.1931"], written
    assert any("no.such.module" in line for line in ours), written


def test_where_stderr_is_no_terminal_there_is_one_line_for_each_thing(tmp_path):
    err = tmp_path / "err"
    with Terminal(tapped("halves", tmp_path / "x"), err) as job:
        assert job_and_ours(job.read()) == (["loss 4.1931", "loss 3.0274", "loss 2.5"], [])
        assert job.process.wait(harness.TIMEOUT) == 0
    lines = err.read_text().splitlines()
    assert [line.split()[1] for line in lines] == ["live", "3", "look"], lines
    assert all(line.startswith(OURS) for line in lines)


def _agent(run: int) -> int:
    children = pathlib.Path(f"/proc/{run}/task/{run}/children").read_text().split()
    (agent,) = (pid for pid in children if b"\0agent\0" in pathlib.Path(f"/proc/{pid}/cmdline").read_bytes())
    return int(agent)
