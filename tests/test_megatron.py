"""megatron-core's parallel layers: the [seq, batch, hidden] order, sharded columns and a sharded sequence."""

import flexmodel
import megatron_tp
import pytest
import tiny
from megatron.core import parallel_state

import captures
import harness
import reference_parallel

BLOCK = ["norm1", "attn", "attn.qkv", "attn.proj", "norm2", "mlp", "mlp.up", "mlp.act", "mlp.down"]
TAPPED = {"embed", "norm", "lm_head", "layers.0", "layers.1"}
TAPPED |= {f"layers.{i}.{name}" for i in range(2) for name in BLOCK}
HOOKS = ";".join(f"{name}:forward,forward_pre,backward,backward_pre" for name in sorted(TAPPED))
STYLES = ["tensor", "sequence"]
ARGV = harness.torchrun("megatron_tp.py", *STYLES)


def one_process(number: int, style: str) -> reference_parallel.Whole:
    model = megatron_tp.build()
    model.embed.reduce_scatter_embeddings = style == "sequence"  # gives [seq, batch, hidden]
    return reference_parallel.sliced(
        model,
        TAPPED.__contains__,
        steps=megatron_tp.STEPS,
        sizes=(megatron_tp.ROWS,),
        loss_of=lambda model, tokens, targets: megatron_tp.loss_of(model(tokens), targets),
        first=number * megatron_tp.STEPS,
    )


@pytest.fixture(scope="module")
def outcome(run_once):
    return run_once(ARGV, HOOKS).expect(0)


@pytest.fixture(scope="module")
def expected():
    with reference_parallel.alone():
        parallel_state.initialize_model_parallel(1)
        found = [one_process(number, style) for number, style in enumerate(STYLES)]
        parallel_state.destroy_model_parallel()
    return found


def test_losses_are_bitwise_those_of_the_untapped_job(outcome, untapped_once, expected):
    assert outcome.losses == untapped_once(ARGV).losses
    assert captures.close_losses(outcome.losses, [loss for whole in expected for loss in whole.losses])


@pytest.mark.parametrize("model", range(len(STYLES)), ids=STYLES)
def test_whole_tensors_are_those_of_one_process(model, outcome, expected):
    captures.expect_sound(outcome.run)
    captures.expect_close(captures.read(outcome.run, model), expected[model].records)


def test_the_layout_names_the_axis_and_the_dimension(outcome):
    records = [r for r in flexmodel.open(outcome.run).records if r.kind == "forward" and r.model == 1]
    up, norm = (next(r for r in records if r.module == name) for name in ("layers.0.mlp.up", "layers.0.norm1"))
    assert [(axis.name, axis.place, axis.dim) for axis in up.layout] == [("tp", "shard", 2)]
    assert [(axis.name, axis.place, axis.dim) for axis in norm.layout] == [("tp", "shard", 0)]
    assert up.shape == (tiny.SEQ, megatron_tp.ROWS, 4 * tiny.WIDTH)
    assert norm.part(1).shape == (tiny.SEQ // 2, megatron_tp.ROWS, tiny.WIDTH)
