"""Two-dimensional meshes on four ranks: replicas of shards (HSDP), and data parallel times tensor parallel."""

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


@pytest.fixture(scope="module")
def replicas():
    return reference_parallel.sliced(tiny.build(), TAPPED.__contains__, steps=hsdp.STEPS, sizes=hsdp.SIZES)


@pytest.fixture(scope="module")
def crossed():
    model = tensor_parallel.build("sequence")
    return reference_parallel.sliced(model, TAPPED.__contains__, steps=fsdp2_tp.STEPS, sizes=fsdp2_tp.SIZES)


@pytest.fixture(scope="module")
def untapped_losses(untapped_once):
    losses = untapped_once(harness.torchrun("hsdp.py", "fsdp1", "fsdp2", ranks=4)).losses
    return {"fsdp1": losses[: hsdp.STEPS], "fsdp2": losses[hsdp.STEPS :]}


@pytest.mark.parametrize("kind", ["fsdp1", "fsdp2"])
def test_replicas_of_shards_give_the_bytes_of_one_process(kind, run_once, untapped_losses, replicas):
    outcome = run_once(harness.torchrun("hsdp.py", kind, ranks=4), HOOKS).expect(0)
    assert outcome.losses == untapped_losses[kind]
    assert captures.close_losses(outcome.losses, replicas.losses)
    captures.expect_sound(outcome.run)
    captures.expect_equal(captures.read(outcome.run), replicas.records)


def test_data_parallel_times_tensor_parallel_is_joined_along_both(run_once, untapped_once, crossed):
    argv = harness.torchrun("fsdp2_tp.py", "sequence", ranks=4)
    outcome = run_once(argv, HOOKS).expect(0)
    assert outcome.losses == untapped_once(argv).losses
    assert captures.close_losses(outcome.losses, crossed.losses)
    captures.expect_sound(outcome.run)
    captures.expect_close(captures.read(outcome.run), crossed.records)


def test_both_axes_are_in_the_layout(run_once):
    import flexmodel

    run = flexmodel.open(run_once(harness.torchrun("fsdp2_tp.py", "sequence", ranks=4), HOOKS).expect(0).run)
    record = next(r for r in run["layers.1.mlp.up"] if r.kind == "forward")
    assert [(axis.name, axis.size) for axis in record.layout] == [("dp", 2), ("tp", 2)]
    assert record.shape == (sum(fsdp2_tp.SIZES), tiny.SEQ, 4 * tiny.WIDTH)
    assert record.part(3).shape == (fsdp2_tp.SIZES[1], tiny.SEQ, 2 * tiny.WIDTH)
