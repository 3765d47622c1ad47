"""Two-dimensional meshes on four ranks: replicas of shards (HSDP), and data parallel times tensor parallel."""

import flexmodel
import fsdp2_tp
import hsdp
import pytest
import tensor_parallel
import tiny

import captures
import layouts
import reference_parallel


@pytest.mark.parametrize("number", range(2), ids=layouts.REPLICAS[-2:])
def test_replicas_of_shards_give_the_bytes_of_one_process(number, run_once):
    outcome = run_once(layouts.REPLICAS, layouts.HOOKS).expect(0)
    captures.expect_sound(outcome.run)
    wanted = layouts.MODULES.__contains__
    expected = reference_parallel.sliced(tiny.build(), wanted, steps=hsdp.STEPS, sizes=hsdp.SIZES)
    captures.expect_equal(layouts.tensors(outcome, number, hsdp.STEPS), expected.records)
    assert captures.close_losses(outcome.losses[number * hsdp.STEPS :][: hsdp.STEPS], expected.losses)


def test_data_parallel_times_tensor_parallel_is_joined_along_both(run_once, untapped_once):
    outcome = run_once(layouts.CROSSED, layouts.HOOKS).expect(0)
    captures.expect_sound(outcome.run)
    model = tensor_parallel.build("sequence")
    wanted = layouts.modules(model).__contains__
    expected = reference_parallel.sliced(model, wanted, steps=fsdp2_tp.STEPS, sizes=fsdp2_tp.SIZES)
    assert outcome.losses == untapped_once(layouts.CROSSED).losses
    assert captures.close_losses(outcome.losses, expected.losses)
    captures.expect_close(layouts.tensors(outcome), expected.records)


def test_both_axes_are_in_the_layout(run_once):
    run = flexmodel.open(run_once(layouts.CROSSED, layouts.HOOKS).expect(0).run)
    record = next(r for r in run["layers.1.mlp.up"] if r.kind == "forward")
    assert [(axis.name, axis.size) for axis in record.layout] == [("dp", 2), ("tp", 2)]
    assert record.shape == (sum(fsdp2_tp.SIZES), tiny.SEQ, 4 * tiny.WIDTH)
    assert record.part(3).shape == (fsdp2_tp.SIZES[1], tiny.SEQ, 2 * tiny.WIDTH)
