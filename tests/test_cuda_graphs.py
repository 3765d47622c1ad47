"""Inside of CUDA graphs nothing is left out in silence, nothing is edited for good, and torch goes on making them.

No GPU is needed: a stand-in captures the graphs (`programs/graphed.py`).
"""

import collections
import json
import pathlib
import re

import flexmodel
import graphed
import pytest

import captures
import harness

CAPTURED = graphed.CAPTURED
KINDS = "forward,forward_pre,backward,backward_pre"
EDITS = (
    f"layers.0.attn:forward@steps={CAPTURED}..{CAPTURED}|scale(0.5)",
    f"layers.0.mlp:backward@steps={CAPTURED}..{CAPTURED}|zero",
)
# Of `layers.1` several nodes send the gradient of its input.
HOOKS = ";".join([f"layers.1:{KINDS}", f"layers.1.mlp:{KINDS}", "lm_head.weight:param,grad", *EDITS])
# How often torch calls what it makes a graph of before.
WARMING_UP = 3
IN_GRAPH = "a tensor inside of a CUDA graph"
ON = {"FLEXMODEL_TEST_GRAPH": "0"}


def ls(run: pathlib.Path) -> harness.Outcome:
    return harness.run([harness.FLEXMODEL, "ls", str(run)], harness.environment()).expect(0)


def counts(outcome: harness.Outcome) -> collections.Counter:
    """How many tensors were refused inside of graphs, by module and kind."""
    refused = flexmodel.open(outcome.run).refused
    assert all(each.reason.startswith(IN_GRAPH) for each in refused), refused
    return collections.Counter((each.what.module, each.what.kind) for each in refused)


@pytest.mark.parametrize("case", ["plain", "compiled"])
def test_what_the_job_captures_itself_is_refused_by_name_counted_and_not_edited(case, untapped_once, tmp_path):
    argv = harness.python("graphed.py", case)
    outcome = harness.tapped(argv, HOOKS, tmp_path / "x", **ON).expect(0)
    # The only edits are of the step that is captured. What that does, it does in every replay: nothing of it is ours.
    assert outcome.out == untapped_once(argv).out
    run = captures.expect_sound(outcome.run)
    taken = collections.Counter((r.module, r.kind, r.step) for r in run.records)
    kinds = KINDS.split(",")
    others = [step for step in range(graphed.STEPS) if step != CAPTURED]
    # An optimizer that is not captured has gradients, which a replay leaves.
    expected = {(module, kind, step) for module in ("layers.1", "layers.1.mlp") for kind in kinds for step in others}
    expected |= {("lm_head.weight", "param", step) for step in others}
    expected |= {("lm_head.weight", "grad", step) for step in range(graphed.STEPS)}
    assert taken == collections.Counter(expected)
    refused = [(module, kind) for module in ("layers.1", "layers.1.mlp") for kind in kinds]
    refused += [("lm_head.weight", "param")]
    edited = [("layers.0.attn", "forward"), ("layers.0.mlp", "backward")]
    assert counts(outcome) == collections.Counter(refused + edited)

    said = [f"'layers.1.mlp:{KINDS}' taps layers.1.mlp inside of a CUDA graph", "'lm_head.weight:param,grad' taps"]
    said += [f"'{clause}' taps" for clause in EDITS] + [f"'{clause}' edits nothing of layers.0" for clause in EDITS]
    notices = json.loads((outcome.run / "run.json").read_text())["notices"]
    listed = ls(outcome.run)
    for start in said:
        assert sum(line.startswith(start) for line in notices) == 1, (start, notices)
        assert outcome.err.count(start) == 1, outcome.text
    assert f"{len(refused + edited)} refused" in listed.out
    assert IN_GRAPH in listed.err, listed.text


def test_the_same_edits_outside_of_a_graph_change_the_job(untapped_once, tmp_path):
    argv = harness.python("graphed.py", "plain")
    outcome = harness.tapped(argv, ";".join(EDITS), tmp_path / "x").expect(0)
    assert outcome.losses != untapped_once(argv).losses
    assert flexmodel.open(outcome.run).refused == []


def test_torch_makes_graphs_of_tapped_modules(untapped_once, tmp_path):
    argv = harness.python("graphed.py", "made")
    hooks = "layers.0:forward;layers.0.mlp:forward;layers.0.attn:forward;layers.1:forward;layers.1.mlp:forward"
    outcome = harness.tapped(argv, hooks, tmp_path / "x", **ON).expect(0)
    assert outcome.out == untapped_once(argv).out
    assert "raised In the beta API" in outcome.out and "hooks of the job's []" in outcome.out
    found = collections.Counter(record.module for record in captures.expect_sound(outcome.run).records)
    # What is outside of graphs is captured as before, also where making one raised. Torch calls a function before.
    outside = {"layers.0": graphed.PASSES, "layers.1": graphed.PASSES, "layers.1.mlp": graphed.PASSES + WARMING_UP}
    assert found == outside | {"layers.0.mlp": 1, "layers.0.attn": 1}
    assert re.search(r"2 tapped modules are inside of CUDA graphs .*: layers\.0\.attn, layers\.0\.mlp\n", outcome.err)
    # The hooks of what a function calls are not known before: there it is the capture that is refused.
    assert counts(outcome) == {("layers.1.mlp", "forward"): 1}


def test_inductor_leaves_each_operation_out_of_its_graphs(tmp_path):
    argv = harness.python("graphed.py", "operations")
    hooks = f"layers.0.mlp:{KINDS};layers.0.attn:forward,backward|scale(0.5)"
    outcome = harness.tapped(argv, hooks, tmp_path / "x").expect(0)
    lines = [line.split(" ") for line in outcome.out.splitlines()]
    firsts = {line[1]: tuple(line[2:]) for line in lines if line[0] == "operation"}
    assert set(firsts.values()) == {("Tensor", "number"), ("Tensor", "call")}, firsts
    given = [tuple(line[1:]) for line in lines if line[0] == "given"]
    # A number or a call, which are on the CPU, and no tensor of the job's.
    assert {name for name, *_ in given} == set(firsts)
    assert {tuple(each) for _, *each in given} == {("cpu", "torch.int64", "1")}, given
    cut = [line.split("|") for line in outcome.out.splitlines() if line.startswith("cut|")]
    ours = {operation: reason for _, operation, reason in cut if operation.startswith("flexmodel.")}
    assert set(ours) == {f"{name.replace('::', '.')}.default" for name in firsts}
    assert all(reason == f"a tap: {operation}" for operation, reason in ours.items()), ours
    assert any(not operation.startswith("flexmodel.") for _, operation, _ in cut), "no other node was asked about"
