"""transformers' own tensor parallel plan, which leaves no DTensor at the boundary of any module."""

import pytest
import tp_llama

import captures
import harness
import reference_parallel

BLOCK = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj"]
BLOCK += ["mlp", "mlp.up_proj", "mlp.act_fn", "mlp.down_proj"]
TAPPED = {"model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "lm_head"}
TAPPED |= {f"model.layers.{i}.{name}" for i in range(2) for name in BLOCK}
HOOKS = ";".join(f"{name}:forward,forward_pre,backward,backward_pre" for name in sorted(TAPPED))


@pytest.fixture(scope="module")
def argv(tmp_path_factory):
    return harness.on_ranks("tp_llama.py", str(tmp_path_factory.mktemp("llama")))


@pytest.fixture(scope="module")
def expected():
    return reference_parallel.sliced(
        tp_llama.build(),
        TAPPED.__contains__,
        steps=tp_llama.STEPS,
        sizes=(tp_llama.ROWS,),
        loss_of=tp_llama.loss_of,
    )


def test_losses_are_bitwise_those_of_the_untapped_job(argv, run_once, untapped_once, expected):
    outcome = run_once(argv, HOOKS).expect(0)
    assert outcome.losses == untapped_once(argv).losses
    assert captures.close_losses(outcome.losses, expected.losses)


def test_whole_tensors_are_those_of_one_process(argv, run_once, expected):
    outcome = run_once(argv, HOOKS).expect(0)
    captures.expect_sound(outcome.run)
    captures.expect_close(captures.read(outcome.run), expected.records)
