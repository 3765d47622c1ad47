"""Processes that capturing processes start: captured if they are ranks of their own, and told apart if not."""

import shlex

import pytest

import captures
import harness

HOOKS = "lm_head:forward"


def test_what_a_rank_starts_is_no_rank_and_says_so(run_once, untapped_once):
    argv = harness.on_ranks("nested.py", "evaluate")
    outcome = run_once(argv, HOOKS).expect(0)
    assert outcome.out == untapped_once(argv).out
    assert outcome.out.count("evaluated") == 1
    assert outcome.err.count("a rank of the job, and no rank itself: not tapped") == 2
    run = captures.expect_sound(outcome.run)
    assert run.info.totals.parts == 2 * 3
    assert [(r.model, r.step, r.shape[0], len(r.parts)) for r in run.records] == [(0, s, 8, 2) for s in range(3)]


@pytest.mark.parametrize(("how", "before"), [("spawn", 0), ("late", 1), ("dry", 0)])
def test_ranks_that_multiprocessing_starts_are_captured(how, before, run_once):
    outcome = run_once(harness.python("nested.py", how), HOOKS).expect(0)
    run = captures.expect_sound(outcome.run)
    assert run.info.world == 2
    assert run.info.totals.parts == before + 2 * 2
    assert "not tapped" not in outcome.err


def test_ranks_that_a_launcher_gives_their_ranks_are_captured(run_once):
    """Also where the launcher is the child of a process that captured."""
    launch = shlex.join(harness.torchrun("nested.py", "evaluate"))
    program = f"import os, sys; sys.path[:0] = [{str(harness.PROGRAMS)!r}]; import plain; plain.main(1); "
    outcome = run_once(["python", "-c", f"{program} sys.exit(os.system({launch!r}) >> 8)"], HOOKS).expect(0)
    assert outcome.err.count("not tapped") == 2
    assert captures.expect_sound(outcome.run).info.totals.parts == 1 + 2 * 3


def test_scripts_that_run_one_after_the_other_are_both_captured(run_once):
    scripts = " && ".join(shlex.join(harness.python("plain.py", steps)) for steps in ("1", "2"))
    outcome = run_once(["bash", "-c", scripts], HOOKS).expect(0)
    assert captures.expect_sound(outcome.run).info.totals.parts == 1 + 2


def test_a_run_inside_of_a_run_is_a_run_of_its_own(run_once, tmp_path):
    inner = [harness.FLEXMODEL, "run", "--hooks", HOOKS, "--out", str(tmp_path / "inner"), "--"]
    inner += harness.python("plain.py", "2")
    program = f"import os, sys; sys.path[:0] = [{str(harness.PROGRAMS)!r}]; import plain; plain.main(1); "
    outcome = run_once(["python", "-c", f"{program} sys.exit(os.system({shlex.join(inner)!r}) >> 8)"], HOOKS).expect(0)
    assert captures.expect_sound(outcome.run).info.totals.parts == 1
    assert captures.expect_sound(tmp_path / "inner").info.totals.parts == 2
