"""Tensor and sequence parallel: whole tensors from DTensors, from shards turned local, and from partial sums."""

import pytest
import tensor_parallel
import tiny

import captures
import harness
import reference_parallel

BLOCK = ["norm1", "attn", "attn.q", "attn.proj", "norm2", "mlp", "mlp.up", "mlp.act", "mlp.down"]
TAPPED = {"embed", "norm", "lm_head", "layers.0", "layers.1"}
TAPPED |= {f"layers.{i}.{name}" for i in range(2) for name in BLOCK}
HOOKS = ";".join(f"{name}:forward,forward_pre,backward,backward_pre" for name in sorted(TAPPED))
STYLES = ["local", "dtensor", "sequence"]


@pytest.fixture(scope="module")
def expected():
    sizes = {"steps": tensor_parallel.STEPS, "sizes": (tensor_parallel.ROWS,)}
    return {s: reference_parallel.sliced(tensor_parallel.build(s), TAPPED.__contains__, **sizes) for s in STYLES}


def test_losses_are_bitwise_those_of_the_untapped_job(run_once, untapped_once, expected):
    untapped = iter(untapped_once(harness.torchrun("tensor_parallel.py", *STYLES)).losses)
    for style in STYLES:
        outcome = run_once(harness.torchrun("tensor_parallel.py", style), HOOKS).expect(0)
        assert outcome.losses == [next(untapped) for _ in range(tensor_parallel.STEPS)], style
        assert captures.close_losses(outcome.losses, expected[style].losses), style


@pytest.mark.parametrize("style", STYLES)
def test_whole_tensors_are_those_of_one_process(style, run_once, expected):
    outcome = run_once(harness.torchrun("tensor_parallel.py", style), HOOKS).expect(0)
    captures.expect_sound(outcome.run)
    captures.expect_close(captures.read(outcome.run), expected[style].records)


def test_what_no_collective_touched_has_the_bytes_of_one_process(run_once, expected):
    """Up to the first sum over ranks: shards of a column are computed as the whole column is."""
    outcome = run_once(harness.torchrun("tensor_parallel.py", "dtensor"), HOOKS).expect(0)
    untouched = {"embed", "layers.0.norm1", "layers.0.attn", "layers.0.mlp.up", "layers.0.mlp.act"}

    def wanted(records):
        return {k: v for k, v in records.items() if k.module in untouched and k.step == 0 and k.kind == "forward"}

    found = wanted(captures.read(outcome.run))
    assert {key.module for key in found} == untouched
    captures.expect_equal(found, wanted(expected["dtensor"].records))


def test_uneven_and_unreduced_parts_say_so(run_once):
    import flexmodel

    run = flexmodel.open(run_once(harness.torchrun("tensor_parallel.py", "dtensor"), HOOKS).expect(0).run)
    head = next(r for r in run["lm_head"] if r.kind == "forward")
    assert [(axis.name, axis.size) for axis in head.layout] == [("tp", 2)]
    assert [head.part(rank).shape[-1] for rank in (0, 1)] == [33, 32]
    down = next(r for r in run["layers.0.mlp.down"] if r.kind == "forward")
    assert "partial" in str(down.layout[0]).lower()
    assert not captures.same_bytes(down.part(0), down.tensor())
    assert down.shape == (tensor_parallel.ROWS, tiny.SEQ, tiny.WIDTH)
