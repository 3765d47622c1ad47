"""Tensor parallelism by hand: on an axis with a name what ranks hold alike is whole, and the rest is apart."""

import pairs
import pytest

import captures
import harness
import layouts
import reference_parallel

CASES = ("unnamed", "named", "sequence")
# Each rank has its own of these: pieces, and addends.
INSIDE = {"mlp.up", "mlp.act", "mlp.down", "mlp.up.weight", "mlp.down.weight"}
SAME = {("mlp.up", "forward_pre"), ("mlp.down", "backward_pre")}


@pytest.fixture(scope="module")
def outcome(run_once):
    return run_once(harness.on_ranks("pairs.py", *CASES, ranks=4), layouts.HOOKS).expect(0)


@pytest.fixture(scope="module")
def expected():
    model, shards = pairs.build(), 4 // pairs.TENSOR
    whole = reference_parallel.sliced(
        model, layouts.modules(model).__contains__, steps=pairs.STEPS, sizes=(pairs.ROWS // shards,) * shards
    )
    values = {(key.module, key.kind, key.path, key.step): value for key, value in whole.records.items()}
    for kind, of in (("param", whole.params), ("grad", whole.grads)):
        values |= {(name, kind, kind, step): value for (name, step), value in of.items()}
    return whole.losses, values


@pytest.mark.parametrize("case", CASES)
def test_what_is_whole_is_that_of_one_process_and_the_rest_is_apart(case, outcome, expected):
    losses, values = expected
    first = CASES.index(case) * pairs.STEPS
    assert captures.close_losses(outcome.losses[first:][: pairs.STEPS], losses)
    run = captures.expect_sound(outcome.run)
    found, apart = {}, {}
    for record in run.records:
        key = record.module, record.kind, record.path, record.step - first
        if key[3] not in range(pairs.STEPS):
            continue
        if record.shape is not None:
            found[key] = record.tensor()
            continue
        with pytest.raises(KeyError, match="is not known"):
            record.tensor()
        apart[key] = [record.part(rank) for rank in range(4)]
    assert found.keys() | apart.keys() == values.keys()
    captures.expect_close(found, {key: values[key] for key in found})
    inside = {key for key in values if key[0] in INSIDE and key[:2] not in SAME}
    if case == "unnamed":
        # What all four hold is the same tensor, whatever the ranks are for.
        same = {key for key in values if key[1] in ("param", "grad")} - inside
        assert found.keys() == same
    else:
        assert apart.keys() == inside
    if case != "sequence":
        # Rank 3 has the second half of rows, and of what is cut.
        kept = apart["mlp.act", "forward", "out", 0][3]
        assert captures.close(kept, values["mlp.act", "forward", "out", 0].chunk(2)[1].chunk(2, -1)[1])
