"""megatron-core's GPTModel in its own pipelines: layers have their numbers in the whole model, microbatches are one."""

import megatron_gpt
import pytest
from megatron.core import parallel_state

import captures
import harness
import reference_parallel

LAYER = ["input_layernorm", "self_attention", "self_attention.linear_qkv", "self_attention.linear_proj", "mlp"]
LAYER += ["mlp.linear_fc1", "mlp.linear_fc2"]
TAPPED = {"embedding", "embedding.word_embeddings", "decoder.final_layernorm", "output_layer"}
TAPPED |= {
    f"decoder.layers.{i}{name}" for i in range(megatron_gpt.LAYERS) for name in ["", *(f".{part}" for part in LAYER)]
}
HOOKS = ";".join(f"{name}:forward,forward_pre,backward,backward_pre" for name in sorted(TAPPED)) + ";**:param,grad"
# These are records of each microbatch; megatron-core's layers give their bias instead of adding it.
WITHOUT_BATCH = ("out[1]", "in.attention_mask")
WAYS = ["1f1b", "interleaved"]
JOBS = {
    "two ranks": harness.on_ranks("megatron_gpt.py", *WAYS, "ddp"),
    "four ranks": harness.on_ranks("megatron_gpt.py", "tp", ranks=4),
}
CASES = [("two ranks", 0), ("two ranks", 1), ("four ranks", 0)]
NAMES = [*WAYS, "tp"]


@pytest.fixture(scope="module")
def expected():
    """The whole batch at once, in one process."""
    with reference_parallel.alone():
        megatron_gpt.without_cuda()
        parallel_state.initialize_model_parallel(1)
        (model,) = megatron_gpt.build()
        whole = reference_parallel.sliced(
            model,
            TAPPED.__contains__,
            steps=megatron_gpt.STEPS,
            sizes=(megatron_gpt.ROWS * megatron_gpt.MICRO,),
            loss_of=lambda model, tokens, targets: megatron_gpt.call(model, tokens, targets).mean(),
        )
        parallel_state.destroy_model_parallel()
    return whole


def test_losses_are_bitwise_those_of_the_untapped_job(run_once, untapped_once, expected):
    assert run_once(JOBS["two ranks"], HOOKS).expect(0).losses == untapped_once(JOBS["two ranks"]).losses
    for job, ways in (("two ranks", 3), ("four ranks", 1)):
        assert captures.close_losses(run_once(JOBS[job], HOOKS).expect(0).losses, expected.losses * ways)


@pytest.mark.parametrize(("job", "way"), CASES, ids=NAMES)
def test_activations_are_those_of_the_whole_batch_in_one_process(job, way, run_once, expected):
    steps = range(way * megatron_gpt.STEPS, (way + 1) * megatron_gpt.STEPS)
    run = captures.expect_sound(run_once(JOBS[job], HOOKS).expect(0).run)
    found, scales = {}, set()
    for r in run.records:
        if r.kind in ("param", "grad") or r.step not in steps or r.path in WITHOUT_BATCH:
            continue
        key = captures.Key(r.module, r.kind, r.path, r.step - steps.start, r.micro, r.call, r.train)
        assert key not in found
        found[key] = r.tensor()
        if r.kind.startswith("backward"):
            scales.add((r.dp_size, r.loss_scale))
    captures.expect_close(found, {k: v for k, v in expected.records.items() if k.path not in WITHOUT_BATCH})
    # The mean over a microbatch, divided by the number of these.
    assert scales == {(megatron_gpt.MICRO, 1 / megatron_gpt.MICRO)}


@pytest.mark.parametrize(("job", "way"), [*CASES, ("two ranks", 2)], ids=[*NAMES, "ddp"])
def test_parameters_and_gradients_are_whole_under_their_names_in_the_whole_model(job, way, run_once, expected):
    steps = range(way * megatron_gpt.STEPS, (way + 1) * megatron_gpt.STEPS)
    records = run_once(JOBS[job], HOOKS).expect(0)
    found = [r for r in captures.expect_sound(records.run).records if r.kind in ("param", "grad") and r.step in steps]
    for kind, wanted in (("param", expected.params), ("grad", expected.grads)):
        of_kind = {(r.module, r.step - steps.start): r.tensor() for r in found if r.kind == kind}
        assert of_kind.keys() == wanted.keys()
        assert all(captures.close(of_kind[key], value) for key, value in wanted.items())


def test_ranks_that_share_the_batch_have_a_record_of_each_microbatch(run_once, expected):
    run = captures.expect_sound(run_once(JOBS["two ranks"], HOOKS).expect(0).run)
    steps = range(len(WAYS) * megatron_gpt.STEPS, (len(WAYS) + 1) * megatron_gpt.STEPS)
    micro = megatron_gpt.MICRO // 2
    found = [r for r in run.records if r.step in steps and r.module == "decoder.layers.3.mlp" and r.path == "in[0]"]
    assert len(found) == 2 * megatron_gpt.STEPS * micro
    for r in found:
        whole = expected.records[captures.Key(r.module, r.kind, r.path, r.step - steps.start)]
        rows = whole.chunk(micro, 1)[r.micro]
        if r.kind == "backward":
            # One process would take the mean over the microbatch, and not divide it.
            assert (r.dp_size, r.loss_scale) == (2, 1 / micro)
            rows = rows * micro * r.dp_size * r.loss_scale
        assert captures.close(r.tensor(), rows)
