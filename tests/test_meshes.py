"""Two-dimensional meshes on four ranks: replicas of shards (HSDP), and data parallel times tensor parallel."""

import flexmodel
import fsdp2_tp
import hsdp
import pytest
import tensor_parallel
import tiny

import captures
import harness
import reference_parallel

BLOCK = ["norm1", "attn", "mlp", "mlp.up", "mlp.act", "mlp.down"]
TAPPED = {"embed", "norm", "lm_head"} | {f"layers.{i}.{name}" for i in range(2) for name in BLOCK}
HOOKS = ";".join(f"{name}:forward,forward_pre,backward,backward_pre" for name in sorted(TAPPED))


KINDS = ["fsdp1", "fsdp2"]
REPLICAS = harness.torchrun("hsdp.py", *KINDS, ranks=4)
CROSSED = harness.torchrun("fsdp2_tp.py", "sequence", ranks=4)


@pytest.mark.parametrize("model", range(len(KINDS)), ids=KINDS)
def test_replicas_of_shards_give_the_bytes_of_one_process(model, run_once):
    outcome = run_once(REPLICAS, HOOKS).expect(0)
    captures.expect_sound(outcome.run)
    expected = reference_parallel.sliced(
        tiny.build(), TAPPED.__contains__, steps=hsdp.STEPS, sizes=hsdp.SIZES, first=model * hsdp.STEPS
    )
    captures.expect_equal(captures.read(outcome.run, model), expected.records)
    assert captures.close_losses(outcome.losses[model * hsdp.STEPS :][: hsdp.STEPS], expected.losses)


def test_data_parallel_times_tensor_parallel_is_joined_along_both(run_once, untapped_once):
    outcome = run_once(CROSSED, HOOKS).expect(0)
    captures.expect_sound(outcome.run)
    expected = reference_parallel.sliced(
        tensor_parallel.build("sequence"), TAPPED.__contains__, steps=fsdp2_tp.STEPS, sizes=fsdp2_tp.SIZES
    )
    assert outcome.losses == untapped_once(CROSSED).losses
    assert captures.close_losses(outcome.losses, expected.losses)
    captures.expect_close(captures.read(outcome.run), expected.records)


def test_both_axes_are_in_the_layout(run_once):
    run = flexmodel.open(run_once(CROSSED, HOOKS).expect(0).run)
    record = next(r for r in run["layers.1.mlp.up"] if r.kind == "forward")
    assert [(axis.name, axis.size) for axis in record.layout] == [("dp", 2), ("tp", 2)]
    assert record.shape == (sum(fsdp2_tp.SIZES), tiny.SEQ, 4 * tiny.WIDTH)
    assert record.part(3).shape == (fsdp2_tp.SIZES[1], tiny.SEQ, 2 * tiny.WIDTH)
