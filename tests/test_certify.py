"""`flexmodel certify` on real jobs: several ranks against one process that has the same global batches."""

import json
import pathlib

import flexmodel
import llama
import pytest

import harness

HOOKS = ";".join(
    f"{name}:forward,forward_pre,backward,backward_pre"
    for name in ("layers.*.norm1", "layers.*.attn", "layers.*.mlp", "lm_head")
)
STEPS = 3
DDP = harness.on_ranks("ddp.py", str(STEPS))
ONE = harness.python("plain.py", str(STEPS), "8")


def certify(run: pathlib.Path, reference: pathlib.Path, *options: str) -> harness.Outcome:
    return harness.run([harness.FLEXMODEL, "certify", str(run), str(reference), *options])


def test_two_ranks_are_certified_against_one_process(run_once):
    ranks, one = run_once(DDP, HOOKS).expect(0).run, run_once(ONE, HOOKS).expect(0).run
    found = certify(ranks, one).expect(0).out
    assert "gradients divided by the data-parallel size before comparison: 2 in the run, 1 in the reference" in found
    counted = json.loads(certify(ranks, one, "--json").expect(0).out)
    # Seven modules, four kinds; the embedding's gradient is not asked for.
    assert counted["records"] == counted["equal"] + counted["close"] == 7 * 4 * STEPS
    assert not any(counted[what] for what in ("different", "unlike", "missing", "extra", "not_comparable"))
    gradients = sum(row["records"] for row in counted["rows"] if row["kind"].startswith("backward"))
    assert counted["divided"] == [{"run_dp_size": 2, "reference_dp_size": 1, "records": gradients}]
    certify(ranks, ranks, "--exact").expect(0)


def test_a_run_with_an_edit_is_not_certified_and_the_worst_record_is_named(run_once):
    edited = run_once(DDP, f"{HOOKS};layers.0.mlp|scale(1.01)").expect(0).run
    one = run_once(ONE, HOOKS).expect(0).run
    outcome = certify(edited, one).expect(1)
    assert outcome.out.splitlines()[-1].startswith("not certified: ")
    counted = json.loads(certify(edited, one, "--json").expect(1).out)
    first = {name.partition("@")[0] for name in counted["different"] if ".step0." in name}
    # An edit is recorded before it is made: what comes after it differs, what came before it does not.
    assert "lm_head:forward:out" in first and "layers.0.mlp:forward:out" not in first
    assert "layers.0.mlp:backward:in[0]" in first, "gradients are small, and not close for that"
    assert f"worst: {counted['worst']['record']}, " in outcome.out
    assert counted["worst"]["record"] in counted["different"]
    # Within what the edit can do, the runs are the same.
    certify(edited, one, "--module", "layers.0.mlp", "--kind", "forward", "--step", "0").expect(0)


LLAMA = "**:forward,backward,param,grad;(root):forward,backward"


@pytest.mark.parametrize(("how", "ranks"), [("fsdp2", 2), ("fsdp2_tp", 4)])
def test_a_llama_on_ranks_is_certified_in_every_module_and_parameter(how, ranks, run_once):
    one = run_once(harness.python("llama.py", "one"), LLAMA).expect(0).run
    run = run_once(harness.on_ranks("llama.py", how, ranks=ranks), LLAMA).expect(0).run
    counted = json.loads(certify(run, one, "--json").expect(0).out)
    assert counted["records"] == counted["equal"] + counted["close"] == len(flexmodel.open(one).records)
    assert not any(counted[what] for what in ("different", "unlike", "missing", "extra", "not_comparable"))
    model = llama.build()
    records = flexmodel.open(run).records
    parameters = {name for name, _ in model.named_parameters()}
    for kind in ("param", "grad"):
        assert {r.module for r in records if r.kind == kind} == parameters
    # Rotations are computed of positions alone, and the model and its head are given what no gradient comes back to.
    modules = {name for name, m in model.named_modules() if type(m).__name__ != "ModuleList"}
    assert {r.module for r in records if r.kind == "forward"} == modules
    missing = modules - {r.module for r in records if r.kind == "backward"}
    assert missing == {"", "model", "model.embed_tokens", "model.rotary_emb"}
    assert [(d["run_dp_size"], d["reference_dp_size"]) for d in counted["divided"]] == [(2, 1)]
