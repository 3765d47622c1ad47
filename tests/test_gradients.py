"""The gradient of an input through one module, where the input has other uses; and that taking it changes nothing."""

import flexmodel
import pytest
import torch
import uses

import captures
import harness
import reference

KINDS = "forward,forward_pre,backward,backward_pre"
BROKEN_BY_AN_ALIAS = {"", "leaf", "changes", "act", "view", "keeps", "same", "rows", "adds", "holds"}
"""Modules that the reference cannot look at; see `reference.alias`."""


@pytest.fixture(scope="module")
def exact(run_once):
    return run_once(harness.python("uses.py", "exact"), f"*:{KINDS};layers.*:{KINDS}").expect(0)


def _gradients(outcome) -> dict[tuple[str, int], torch.Tensor]:
    """Of every module's first input, by module and step."""
    found = captures.read(outcome.run).items()
    return {(key.module, key.step): value for key, value in found if (key.kind, key.path) == ("backward", "in[0]")}


def test_a_gradient_is_that_through_the_module_alone(exact):
    model = uses.build(exact=True)
    recorder = reference.Recorder(model, lambda name: name not in BROKEN_BY_AN_ALIAS)
    for step in range(2):
        recorder.forward_pass(step)
        uses.loss_of(model, uses.batch(step, exact=True)).backward()
    found = {key: value for key, value in captures.read(exact.run).items() if key.module not in BROKEN_BY_AN_ALIAS}
    captures.expect_equal(found, recorder.found)


def test_a_module_that_changes_its_input_has_its_gradient(exact):
    gradients = _gradients(exact)
    for step in range(2):
        memory = uses.batch(step, exact=True) @ uses.build(exact=True).first.weight.detach().T
        # Through `y = 2x` and through the sum of 4 rows, added to each of them.
        assert torch.equal(gradients["changes", step], torch.full_like(memory, 2.0 + 2.0 * 4))
        assert torch.equal(gradients["act", step], (memory + 1 > 0).double())
        assert torch.equal(gradients["leaf", step], torch.full_like(uses.LEAF, 2.0 * 4).detach())


def test_an_output_that_is_changed_after_it_was_returned_has_its_gradient(exact):
    found = captures.read(exact.run)
    for step in range(2):
        key = reference.Key("rows", "backward_pre", "out", step)
        assert torch.equal(found[key], torch.full((1, 4, uses.WIDTH), 5.0, dtype=torch.double))


def test_a_gradient_that_cannot_be_told_is_counted_and_no_other_is(exact):
    refused = {(r.module, r.kind, r.path) for r in flexmodel.open(exact.run).refused}
    assert refused == {
        ("keeps", "backward", "in[0]"),
        ("view", "backward", "in[0]"),
        ("same", "backward", "in[0]"),  # returned as it is, and used in other ways too
        ("adds", "backward", "in[0].x"),
        ("adds", "backward", "in[0].leaf"),
        ("adds", "backward_pre", "out.leaf"),
        ("holds", "backward_pre", "out"),
    }
    assert not {"keeps", "view", "same"} & {module for module, _ in _gradients(exact)}


@pytest.mark.parametrize("how", ["exact", "random"])
def test_no_bit_of_the_job_changes(how, run_once, untapped_once):
    program = harness.python("uses.py", how)
    assert run_once(program, f"*:{KINDS};layers.*:{KINDS}").expect(0).out == untapped_once(program).out


def test_in_place_activations_have_the_gradient_of_what_they_were_given(run_once):
    found = captures.read(run_once(harness.python("inplace.py"), f"*:{KINDS}").expect(0).run)
    for step in range(2):
        key = reference.Key("act", "backward", "in[0]", step)
        assert captures.same_bytes(found[key], found[key._replace(module="first", kind="backward_pre", path="out")])


def test_an_edit_reaches_what_computed_the_input(run_once):
    argv = harness.python("inplace.py")
    plain = captures.read(run_once(argv, f"*:{KINDS}").expect(0).run)
    edited = captures.read(run_once(argv, f"third:backward|scale(4);*:{KINDS}").expect(0).run)
    given = reference.Key("third", "backward", "in[0]", 0)
    made = given._replace(module="second", kind="backward", path="in[0]")
    assert captures.same_bytes(edited[given], plain[given]), "recorded before its own edit"
    assert torch.equal(edited[made], plain[made] * 4)


def test_every_backward_pass_through_a_call_is_a_record(run_once, untapped_once):
    program = harness.python("twice.py")
    outcome = run_once(program, "class=Thrice:backward").expect(0)
    assert outcome.out == untapped_once(program).out
    first, second = flexmodel.open(outcome.run).records
    assert (first.repeat, second.repeat) == (0, 1)
    assert captures.same_bytes(first.tensor(), second.tensor())


def test_compiled_autograd_works_and_what_it_leaves_out_is_told(run_once, untapped_once):
    program = harness.python("compiled_autograd.py")
    outcome = run_once(program, f"*:{KINDS}").expect(0)
    assert outcome.losses == untapped_once(program).losses
    assert outcome.err.count("gradients in graphs that torch's compiled autograd makes are not captured") == 1
    assert {record.kind for record in flexmodel.open(outcome.run).records} == {"forward", "forward_pre"}
