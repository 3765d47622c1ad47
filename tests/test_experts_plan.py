"""transformers' own plans for experts: on ranks of the batch, which send them tokens, or in pieces."""

import experts_plan
import pytest

import captures
import harness
import layouts
import reference_parallel

KINDS = "forward,forward_pre,backward,backward_pre"
CASES = tuple(experts_plan.CASES)
# What nobody says how it lies: rows in the order in which they came, and two weights in one.
ROWS, PACKED = "model.layers.0.mlp.experts.act_fn", "model.layers.0.mlp.experts.gate_up_proj"
APART = {"dispatched": {ROWS}, "packed": {ROWS, PACKED}}


@pytest.fixture(scope="module")
def outcome(tmp_path_factory, run_once):
    folder = str(tmp_path_factory.mktemp("experts"))
    experts_plan.build().save_pretrained(folder)
    argv = harness.on_ranks("experts_plan.py", folder, *CASES, ranks=4)
    return run_once(argv, f"**:{KINDS},param,grad").expect(0)


@pytest.fixture(scope="module")
def run(outcome):
    return captures.expect_sound(outcome.run)


@pytest.mark.parametrize("case", CASES)
def test_what_is_whole_is_that_of_one_process_and_the_rest_is_apart(case, outcome, run):
    model, shards = experts_plan.build(), experts_plan.CASES[case]["fsdp_size"]
    wanted = layouts.modules(model)
    expected = reference_parallel.sliced(
        model,
        wanted.__contains__,
        steps=experts_plan.STEPS,
        sizes=(experts_plan.ROWS // shards,) * shards,
        loss_of=experts_plan.loss_of,
        total=reference_parallel.in_turn,
    )
    number, steps = CASES.index(case), experts_plan.STEPS
    assert captures.close_losses(outcome.losses[number * steps :][:steps], expected.losses)
    values = {(key.module, key.kind, key.path, key.step): value for key, value in expected.records.items()}
    # The reference has the table of positions once for each slice of the batch.
    for key in values:
        if "position" in key[2] or key[:2] == ("model.rotary_emb", "forward"):
            values[key] = values[key][:1]
    for kind, of in (("param", expected.params), ("grad", expected.grads)):
        values |= {(name, kind, kind, step): value for (name, step), value in of.items()}
    found = {}
    for record in run.records:
        if record.model != number:
            continue
        key = record.module, record.kind, record.path, record.step - number * steps
        if record.module in APART[case]:
            with pytest.raises(KeyError, match=r"is not known|different layouts"):
                record.tensor()
            assert record.part(3).numel()
        else:
            found[key] = record.tensor()
    assert {key[0] for key in values} - {key[0] for key in found} == APART[case]
    captures.expect_close(found, {key: value for key, value in values.items() if key[0] not in APART[case]})


def test_axes_of_experts_and_of_the_batch_are_one_for_activations_and_two_for_parameters(run):
    def axes(name, kind):
        record = next(r for r in run[name] if r.kind == kind and r.model == 0)
        return [(axis.name, axis.size) for axis in record.layout]

    assert axes("lm_head", "forward") == [("dp", 4)]
    assert ("ep", 2) in axes(PACKED, "param")
