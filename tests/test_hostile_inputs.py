"""What modules are given stays what it is, whatever it is."""

import hostile
import pytest
import torch

import captures
import harness

KINDS = "forward,forward_pre,backward,backward_pre"


@pytest.fixture(scope="module")
def tapped(run_once):
    return run_once(harness.python("hostile.py"), f"*:{KINDS}").expect(0)


def test_the_job_prints_what_it_prints_untapped(tapped, untapped_once):
    assert tapped.out == untapped_once(harness.python("hostile.py")).out
    assert "inputs alive: 0" in tapped.out


def test_structures_that_never_end_are_looked_at_once(tapped):
    found = captures.read(tapped.run)
    paths = {key.path for key in found if key.module == "linked" and key.kind == "forward_pre"}
    assert paths == {"in[0]", "in[1].value"}
    assert "more than 10000 values at 'in'" in tapped.err


def test_gradients_reach_inputs_of_every_class(tapped):
    found = captures.read(tapped.run)
    gradients = {(key.module, key.path) for key in found if key.kind == "backward"}
    assert {("greeted", "in[0]"), ("weighed", "in[0]"), ("weighed", "in[1]")} <= gradients


def test_a_gradient_that_cannot_be_read_is_counted(tapped):
    import flexmodel

    refused = {(r.module, r.kind) for r in flexmodel.open(tapped.run).refused}
    assert ("sparse", "backward_pre") in refused and ("sparse", "forward") in refused


def test_an_edit_keeps_what_the_job_set_on_a_tensor(tmp_path):
    outcome = harness.tapped(harness.python("hostile.py"), "greeted:forward_pre|scale(2)", tmp_path / "x").expect(0)
    record = next(iter(captures.read(outcome.run).values()))
    assert record.shape == (4, hostile.WIDTH) and type(record) is torch.Tensor


def test_clauses_that_meet_lose_nothing(tmp_path):
    hooks = "weighed@reduce=stats;weighed@every=2;greeted@group=a;greeted@group=b"
    outcome = harness.tapped(harness.python("hostile.py"), hooks, tmp_path / "x").expect(0)
    import flexmodel

    records = {r.step: r for r in flexmodel.open(outcome.run).records if r.module == "weighed"}
    assert records[0].tensor().shape == (4, hostile.WIDTH)
    with pytest.raises(flexmodel.NotCapturedError, match="statistics"):
        records[1].tensor()
    assert "'greeted@group=a' and 'greeted@group=b' both tap greeted" in outcome.err
