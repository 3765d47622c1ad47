"""A tensor of which FlexModel cannot ask how it lies is refused by name: it must not pass for one of which nothing is
known, which may be taken for whole."""

import collections

import flexmodel
import odd_layouts
import pytest

import captures
import harness

HOOKS = "**:forward,backward_pre"
JOBS = {"eager": (harness.torchrun("odd_layouts.py"), 2), "compiled": (harness.python("odd_layouts.py", "compiled"), 1)}


@pytest.mark.parametrize("how", JOBS)
def test_a_tensor_that_raises_when_asked_is_refused_by_name(how, run_once, untapped_once):
    argv, ranks = JOBS[how]
    outcome = run_once(argv, HOOKS).expect(0)
    captures.expect_sound(outcome.run)
    assert outcome.losses == untapped_once(argv).losses
    assert "taps are off" not in outcome.err
    run = flexmodel.open(outcome.run)
    refused = collections.Counter((r.module, r.kind) for r in run.refused)
    # Compiled, the model is called once more, as it is written: in a process alone nothing is asked then.
    assert refused == {("odd", kind): ranks * odd_layouts.STEPS for kind in ("forward", "backward_pre")}
    assert all("raised when it was looked at" in r.reason for r in run.refused)
    assert any("out" in line and "a private base" in line for line in run.notices), run.notices
    others = collections.Counter(r.module for r in run.records if r.kind == "backward_pre")
    assert others == dict.fromkeys(("", "first", "last"), odd_layouts.STEPS)
