"""The way from a rank to its agent: an agent that takes nothing, a rank that finds out late which one it is, and the
word that taps are off."""

import pathlib
import signal
import socket as socket_module

import flexmodel
import pytest

import captures
import harness

EXPERTS = 8000
"""The message that names them is larger than what a socket holds."""


class Listener:
    """Somebody who listens where the agent should, and lets nobody in: its queue is full."""

    def __init__(self, path: pathlib.Path):
        self.sockets = [socket_module.socket(socket_module.AF_UNIX)]
        self.sockets[0].bind(str(path))
        self.sockets[0].listen(0)
        while True:
            self.sockets.append(socket_module.socket(socket_module.AF_UNIX))
            self.sockets[-1].setblocking(False)
            try:
                self.sockets[-1].connect(str(path))
            except BlockingIOError:
                return

    def __enter__(self):
        return self

    def __exit__(self, *_exc) -> None:
        for each in self.sockets:
            each.close()


def test_an_agent_whose_queue_is_full_is_an_absent_one(tmp_path, untapped_once):
    with Listener(tmp_path / "s"):
        outcome = harness.run(harness.python("plain.py"), harness.preloaded("*:forward", tmp_path / "s")).expect(0)
    assert outcome.losses == untapped_once(harness.python("plain.py")).losses
    assert outcome.err.count("no agent at") == 1, outcome.text


def test_a_stopped_agent_gets_the_rest_of_a_long_message_when_it_goes_on(tmp_path):
    out, socket, stop = tmp_path / "x", tmp_path / "s", tmp_path / "stop"
    program = harness.python("experts.py", str(stop), str(EXPERTS))
    with harness.agent(out, socket) as agent:
        agent.process.send_signal(signal.SIGSTOP)
        with harness.Job(program, harness.preloaded("shared:forward", socket)) as job:
            job.wait_for_line("step 100 ")
            agent.process.send_signal(signal.SIGCONT)
            harness.wait_until(lambda: _models(out) != [], "the model", job=job)
            stop.touch()
            outcome = job.wait().expect(0)
    assert "flexmodel:" not in outcome.err, "it stopped and was not gone"
    (model,) = _models(out)
    assert len(model.modules) == EXPERTS + 3
    run = captures.expect_sound(out)
    assert len(run.records) == len(outcome.losses)


@pytest.mark.parametrize("how", ["wrapped", "bare"])
def test_a_rank_that_tapped_before_it_knew_which_one_it_is_loses_nothing(how, tmp_path):
    program = harness.python("late_rank.py", str(tmp_path / "meet"), how)
    outcome = harness.tapped(program, "lm_head:forward", tmp_path / "x").expect(0)
    run = captures.expect_sound(outcome.run)
    assert run.info.world == 2
    # Each process's trial is rank 0's until it knows better; each of the three steps then has both ranks' parts.
    assert run.info.totals.parts == 2 + 3 * 2
    assert sum(record.complete and record.shape[0] == 8 and len(record.parts) == 2 for record in run.records) == 3


@pytest.mark.parametrize(
    ("fault", "notice"),
    [
        ("panic-in-tap", "rank 0: taps are off: a panic in a tap"),
        ("panic-in-load", "a process of the job: taps are off: a panic while starting"),
    ],
)
def test_the_run_says_in_which_rank_taps_went_off_and_why(fault, notice, tmp_path):
    with harness.agent(tmp_path / "x", tmp_path / "s"):
        env = harness.preloaded("*:forward", tmp_path / "s", FLEXMODEL_TEST_FAULT=fault)
        outcome = harness.run(harness.python("plain.py"), env).expect(0)
    assert outcome.err.count("taps are off") == 1, outcome.text
    notices = flexmodel.open(tmp_path / "x").info.notices
    assert len(notices) == 1 and notices[0].startswith(notice), notices


def _models(out: pathlib.Path) -> list:
    try:
        return list(flexmodel.open(out).info.models)
    except flexmodel.RunError:
        return []
