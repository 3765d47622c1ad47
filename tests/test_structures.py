"""Every leaf of every container, every element type, every form of tensor, and in-place operations."""

import dtypes
import flexmodel
import inplace
import pytest
import structures
import torch

import captures
import harness
import reference
import reference_runs

KINDS = "forward,forward_pre,backward,backward_pre"


def test_each_tensor_leaf_has_its_path(run_once):
    names = {"tuple", "dict", "data", "named", "head"}
    expected, losses = reference_runs.single(
        structures.build(), names.__contains__, structures.batch, lambda model, *xs: model(*xs).loss, steps=2
    )
    outcome = run_once(harness.python("structures.py"), f"*:{KINDS}").expect(0)
    assert outcome.losses == losses
    captures.expect_sound(outcome.run)
    captures.expect_equal(captures.read(outcome.run), expected)


def test_a_path_option_keeps_one_leaf(run_once):
    hooks = "tuple@path=out[2];data:forward_pre@path=in.states.value"
    outcome = run_once(harness.python("structures.py"), hooks).expect(0)
    found = {(key.module, key.path) for key in captures.read(outcome.run)}
    assert found == {("tuple", "out[2]"), ("data", "in.states.value")}


def test_in_place_operations_change_neither_record_nor_job(run_once):
    expected, losses = reference_runs.single(
        inplace.build(), bool, inplace.batch,
        lambda model, x, targets: torch.nn.functional.cross_entropy(model(x), targets), steps=2,
    )  # fmt: skip
    outcome = run_once(harness.python("inplace.py"), f"*:{KINDS}").expect(0)
    assert outcome.losses == losses
    captures.expect_sound(outcome.run)
    # The reference loses the gradient of an input that is changed in place; see test_gradients.py.
    found = {key: value for key, value in captures.read(outcome.run).items() if key[:2] != ("act", "backward")}
    captures.expect_equal(found, expected)


REFUSED = {"form.sparse", "form.csr", "form.nested", "form.meta"}


@pytest.fixture(scope="module")
def unusual(run_once):
    return run_once(harness.python("dtypes.py"), "cast.*;form.*").expect(0)


def test_every_element_type_and_form_is_kept_to_the_bit(unusual):
    model = dtypes.Everything()
    recorder = reference.Recorder(model, lambda name: name.count(".") == 1 and name not in REFUSED)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(2):
        recorder.forward_pass(step)
        optimizer.zero_grad()
        model(dtypes.batch(step)).backward()
        optimizer.step()
    expected = {key: value for key, value in recorder.found.items() if key.kind == "forward"}
    assert len(expected) == 2 * (len(dtypes.DTYPES) + len(dtypes.FORMS) - len(REFUSED))
    captures.expect_equal(captures.read(unusual.run), expected)


def test_what_cannot_be_captured_is_refused_with_a_reason_and_counted(unusual):
    run = flexmodel.open(unusual.run)
    refused = [(refusal.module, refusal.step) for refusal in run.refused]
    assert sorted(refused) == sorted((name, step) for name in REFUSED for step in range(2))
    assert all(refusal.reason for refusal in run.refused)
    reasons = {refusal.module: refusal.reason for refusal in run.refused}
    assert "sparse" in reasons["form.sparse"]
    assert run.info.totals.refused == len(refused)


def test_dtype_option_converts(run_once):
    outcome = run_once(harness.python("plain.py"), "lm_head@dtype=bfloat16").expect(0)
    plain = run_once(harness.python("plain.py"), "lm_head").expect(0)
    narrow, full = captures.read(outcome.run), captures.read(plain.run)
    assert narrow.keys() == full.keys() and narrow
    for key, value in full.items():
        assert captures.same_bytes(narrow[key], value.bfloat16())


def test_statistics_only_keeps_no_bytes(run_once):
    outcome = run_once(harness.python("plain.py"), "lm_head@reduce=stats").expect(0)
    run = flexmodel.open(outcome.run)
    full = captures.read(run_once(harness.python("plain.py"), "lm_head").run)
    assert len(run.records) == len(full)
    assert run.info.totals.bytes == 0
    for record in run.records:
        value = full[captures.Key("lm_head", "forward", "out", record.step)].double()
        assert record.stats.count == value.numel()
        assert record.stats.mean == pytest.approx(value.mean().item())
        assert record.stats.absmax == value.abs().max().item()
