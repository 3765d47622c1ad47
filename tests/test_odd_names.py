"""Whatever a module is called, a clause can mean it alone, and its records are found under its name."""

import re

import flexmodel
import odd_names
import pytest

import captures
import harness
import reference

ARGV = harness.python("odd_names.py")
KINDS = ":forward,backward_pre@steps=0..0"


@pytest.fixture(scope="module")
def expected():
    model = odd_names.build()
    recorder = reference.Recorder(model, odd_names.NAMES.__contains__)
    recorder.forward_pass(0)
    model(odd_names.batch(0)).square().mean().backward()
    return {key: value for key, value in recorder.found.items() if key.kind in ("forward", "backward_pre")}


def clause(name: str) -> str:
    """A regular expression that means this module alone."""
    return "/^" + re.escape(name).replace("/", r"\/").replace("\n", "n").replace("\t", "t") + "$/"


HOOKS = {"glob": ["*"], "by name": [clause(name) for name in odd_names.NAMES]}


@pytest.mark.parametrize("how", HOOKS)
def test_every_name_is_captured(how, run_once, untapped_once, expected):
    outcome = run_once(ARGV, ";".join(each + KINDS for each in HOOKS[how])).expect(0)
    assert outcome.losses == untapped_once(ARGV).losses
    captures.expect_sound(outcome.run)
    captures.expect_equal(captures.read(outcome.run), expected)


def test_the_commands_find_them(run_once, tmp_path):
    run = run_once(ARGV, f"*{KINDS}").expect(0).run
    for name in odd_names.NAMES:
        harness.run([harness.FLEXMODEL, "show", str(run), name, "--kind", "forward", "--json"]).expect(0)
    harness.run([harness.FLEXMODEL, "ls", str(run)]).expect(0)
    harness.run([harness.FLEXMODEL, "export", str(run), "--to", "npy", str(tmp_path / "out")]).expect(0)
    assert len(list((tmp_path / "out").glob("*.npy"))) == len(flexmodel.open(run).records)
