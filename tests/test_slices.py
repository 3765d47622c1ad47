"""`slice=[...]`: the slice of the whole, or a reason; never a slice of each rank's piece."""

import left
import pytest
import tensor_parallel
import test_tensor_parallel
import test_unclipped
import tiny

import captures
import harness
import layouts
import reference_parallel
import reference_runs

KINDS = layouts.KINDS
STYLES = test_tensor_parallel.STYLES


@pytest.fixture(scope="module")
def tensor_parallel_run(run_once, untapped_once):
    outcome = run_once(layouts.TENSOR_PARALLEL, f"**:{KINDS}@slice=[:,-1];**:param,grad@slice=[...,0]").expect(0)
    assert outcome.losses == untapped_once(layouts.TENSOR_PARALLEL).losses
    return captures.expect_sound(outcome.run)


@pytest.mark.parametrize("number", range(len(STYLES)), ids=STYLES)
def test_under_tensor_parallelism_it_is_that_of_the_whole_or_none(number, tensor_parallel_run):
    steps, rows = tensor_parallel.STEPS, tensor_parallel.ROWS
    wanted = test_tensor_parallel.TAPPED
    whole = reference_parallel.sliced(
        tensor_parallel.build(STYLES[number]), wanted.__contains__, steps=steps, sizes=(rows,), first=number * steps
    )
    expected = {key: value[:, -1] for key, value in whole.records.items()}
    for kind, values in (("param", whole.params), ("grad", whole.grads)):
        expected |= {captures.Key(name, kind, kind, step): value[..., 0] for (name, step), value in values.items()}
    records = [r for r in tensor_parallel_run.records if r.model == number]
    assert {r.slice for r in records if r.complete} == {"[:,-1]", "[...,0]"}
    keys = {r: captures.Key(r.module, r.kind, r.path, r.step, r.micro, r.call, r.train) for r in records if r.complete}
    found = {key: record.tensor() for record, key in keys.items() if key in expected}
    captures.expect_close(found, {key: expected[key] for key in found})
    forward = {key.module for key in found if key.kind == "forward"}
    # What every rank has whole, or a piece of the hidden dimension of, is there; pieces of the sequence are not cut.
    if STYLES[number] == "sequence":
        assert "layers.0.mlp.act" in forward and "layers.0.norm1" not in forward
    else:
        assert {"embed", "layers.0.mlp", "layers.0.mlp.act", "layers.1", "lm_head"} <= forward


def test_a_slice_of_what_is_in_pieces_is_refused_by_name(tensor_parallel_run):
    reasons = refusals(tensor_parallel_run)
    assert "slice=[:,-1]: ranks hold pieces of dimension 1 along tp" in reasons["layers.0.norm1"]
    assert "slice=[...,0]: ranks hold pieces of dimension 1 along tp" in reasons["layers.0.mlp.down.weight"]


def refusals(run):
    """Reasons by module."""
    found = {}
    for refused in run.refused:
        found.setdefault(refused.module, set()).add(refused.reason)
    return found


def test_flattened_and_sharded_parameters_are_refused_by_name(run_once):
    run = captures.expect_sound(run_once(test_unclipped.ARGV, test_unclipped.HOOKS).expect(0).run)
    case = dict(enumerate(test_unclipped.CASES))
    refused = {name: set() for name in case.values()}
    for each in run.refused:
        refused[case[each.what.model]].add(each.reason)
    assert refused == {
        "ddp": set(),
        "fsdp1": {"slice=[0]: ranks hold runs of the flattened elements along dp, and no dimensions"},
        "fsdp2": {"slice=[0]: ranks hold pieces of dimension 0 along dp"},
    }
    weight = run.get("lm_head.weight", kind="param", step=0, model=0)
    assert captures.same_bytes(weight, left.build().lm_head.weight.detach()[0])


@pytest.mark.parametrize("assemble", ["agent", "collective"])
def test_rows_of_the_batch_are_joined_as_those_of_the_whole_are(assemble, run_once):
    sizes, hooks = (4, 4), f"**:{KINDS}@slice=[:,1::5],assemble={assemble}"
    expected, losses = reference_runs.data_parallel(
        tiny.build(), layouts.MODULES.__contains__, steps=layouts.STEPS, sizes=sizes
    )
    outcome = run_once(harness.on_ranks("ddp.py"), hooks).expect(0)
    assert outcome.losses == losses
    captures.expect_sound(outcome.run)
    captures.expect_equal(captures.read(outcome.run), {key: value[:, 1::5] for key, value in expected.items()})


def test_statistics_and_other_indices(run_once):
    """An integer takes its dimension away, and statistics are of the slice."""
    hooks = "layers.0.mlp@slice=[:, -1],mode=train;layers.1.mlp@slice=[0:2,..., 3],reduce=stats;lm_head@slice=[0]"
    outcome = run_once(harness.python("plain.py"), hooks + ";**.up.weight:param@slice=[::2,1:3]").expect(0)
    expected, losses = reference_runs.data_parallel(tiny.build(), lambda _: True, steps=3, sizes=(4,))
    assert outcome.losses == losses
    run = captures.expect_sound(outcome.run)
    outputs = {(key.module, key.step): value for key, value in expected.items() if key.kind == "forward"}
    for step in range(3):
        assert captures.same_bytes(run.get("layers.0.mlp", step=step), outputs["layers.0.mlp", step][:, -1])
        assert captures.same_bytes(run.get("lm_head", step=step), outputs["lm_head", step][0])
        (record,) = (r for r in run["layers.1.mlp"] if r.step == step)
        assert record.stats.mean == pytest.approx(outputs["layers.1.mlp", step][0:2, :, 3].mean().item(), rel=1e-4)
        assert record.stats.count == 2 * tiny.SEQ
    weight = run.get("layers.0.mlp.up.weight", kind="param", step=0)
    assert captures.same_bytes(weight, tiny.build().layers[0].mlp.up.weight.detach()[::2, 1:3])


def test_a_slice_is_compared_with_a_slice(run_once):
    jobs = [
        run_once(harness.python("plain.py"), f"lm_head@slice={slice}").expect(0).run for slice in ("[:,0]", "[:,-1]")
    ]
    answer = harness.run([harness.FLEXMODEL, "certify", *map(str, jobs)])
    assert answer.code == 1 and "[:,0] and [:,-1] in the reference" in answer.out, answer.text
    harness.run([harness.FLEXMODEL, "certify", str(jobs[0]), str(jobs[0])]).expect(0)
