"""Tensor and sequence parallel: whole tensors from DTensors, from shards turned local, and from partial sums."""

import flexmodel
import pytest
import tensor_parallel
import tiny

import captures
import layouts
import reference_parallel

BLOCK = ["norm1", "attn", "attn.q", "attn.proj", "norm2", "mlp", "mlp.up", "mlp.act", "mlp.down"]
TAPPED = {"embed", "norm", "lm_head", "layers.0", "layers.1"}
TAPPED |= {f"layers.{i}.{name}" for i in range(2) for name in BLOCK}
STYLES = layouts.TENSOR_PARALLEL[-3:]


@pytest.fixture(scope="module")
def run(run_once):
    return flexmodel.open(run_once(layouts.TENSOR_PARALLEL, layouts.HOOKS).expect(0).run)


@pytest.fixture(scope="module")
def expected():
    steps, sizes = tensor_parallel.STEPS, (tensor_parallel.ROWS,)
    models = enumerate(map(tensor_parallel.build, STYLES))
    return [
        reference_parallel.sliced(model, TAPPED.__contains__, steps=steps, sizes=sizes, first=number * steps)
        for number, model in models
    ]


def test_losses_are_bitwise_those_of_the_untapped_job(run_once, untapped_once, expected):
    outcome = run_once(layouts.TENSOR_PARALLEL, layouts.HOOKS).expect(0)
    captures.expect_sound(outcome.run)
    assert outcome.losses == untapped_once(layouts.TENSOR_PARALLEL).losses
    assert captures.close_losses(outcome.losses, [loss for whole in expected for loss in whole.losses])


@pytest.mark.parametrize("model", range(len(STYLES)), ids=STYLES)
def test_whole_tensors_are_those_of_one_process(model, run, expected):
    found = captures.read(run.path, model).items()
    captures.expect_close({key: value for key, value in found if key.module in TAPPED}, expected[model].records)


def test_what_no_collective_touched_has_the_bytes_of_one_process(run, expected):
    """Up to the first sum over ranks: a shard of columns is computed as the whole is."""
    model = STYLES.index("dtensor")
    untouched = {"embed", "layers.0.norm1", "layers.0.attn", "layers.0.mlp.up", "layers.0.mlp.act"}

    def wanted(records):
        first = model * tensor_parallel.STEPS
        return {k: v for k, v in records.items() if k.module in untouched and k.step == first and k.kind == "forward"}

    found = wanted(captures.read(run.path, model))
    assert {key.module for key in found} == untouched
    captures.expect_equal(found, wanted(expected[model].records))


def test_uneven_and_unreduced_parts_say_so(run):
    model = STYLES.index("dtensor")
    records = [r for r in run.records if r.kind == "forward" and r.model == model]
    head, down = (next(r for r in records if r.module == name) for name in ("lm_head", "layers.0.mlp.down"))
    assert [(axis.name, axis.size) for axis in head.layout] == [("tp", 2)]
    assert [head.part(rank).shape[-1] for rank in (0, 1)] == [33, 32]
    assert [axis.place for axis in down.layout] == ["partial"]
    assert down.shape == (tensor_parallel.ROWS, tiny.SEQ, tiny.WIDTH)
    assert not captures.same_bytes(down.part(0), down.tensor())
