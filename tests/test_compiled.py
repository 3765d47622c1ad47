"""Modules inside torch.compile: captured as where nothing is compiled, and the compiler does what it does without us.

The programs print how often torch.compile compiled, its graphs and its graph breaks: equal lines are equal counts.
"""

import flexmodel
import pytest

import captures
import harness

ALL = "forward,forward_pre,backward,backward_pre"
TINY = f"layers.*.mlp:{ALL};layers.*.attn.qkv:{ALL};layers.1:{ALL};lm_head:{ALL},param,grad;embed:param"
HOOKS = (
    f"first:{ALL};case:{ALL};case.**:{ALL};last:{ALL},param,grad;{TINY};"
    "some_case.parts.1.first:forward,backward;some_case.parts.3:forward,backward_pre;"
    "some_case.first:forward|scale(0.5);some_case.second:backward_pre|scale(3);"
    "some_case.act:forward_pre@steps=37..38|zero;some_case.second:backward|scale(2);some_first:forward,backward"
)
CASES = ("InPlace", "Structured", "Repeated", "Checkpointed", "Broken", "Outside", "Uneven", "Function")
SPECS = (*CASES, "tiny/blocks", "tiny/model", "tiny/backward", "some_Uneven", "some_InPlace", "Repeated@inductor")
FUSED = SPECS.index("Repeated@inductor")

# Tensor parallel models come first: the first name of a mesh's ranks stays.
PARALLEL = ("tp", "dtensor", "fsdp2", "fsdp2-model", "ddp-whole", "ddp")
DDP = PARALLEL.index("ddp")
# In the second step of the model with DTensors.
EDITED = 2 * PARALLEL.index("dtensor") + 1
PARALLEL_HOOKS = (
    f"layers.*.mlp:{ALL};layers.*.mlp.*:{ALL};layers.0:{ALL};lm_head:{ALL},param,grad;"
    f"layers.1.mlp.up:forward@steps={EDITED}..{EDITED}|scale(0.5);"
    f"layers.0.mlp.down:forward_pre@steps={EDITED}..{EDITED}|scale(3);"
    f"layers.0.mlp.up:backward_pre@steps={EDITED}..{EDITED}|scale(2);"
    f"layers.1.mlp.down:backward@steps={EDITED}..{EDITED}|zero"
)


def compiler(outcome: harness.Outcome) -> list[str]:
    """What the program tells of the compiler."""
    return [line for line in outcome.out.splitlines() if line.startswith("graphs")]


def by_model(outcome: harness.Outcome) -> dict:
    keys = ("model", "module", "kind", "path", "step", "micro", "call", "train", "repeat")
    return {tuple(getattr(record, key) for key in keys): record for record in flexmodel.open(outcome.run).records}


def refused(outcome: harness.Outcome) -> dict:
    keys = ("model", "module", "kind", "path", "step")
    return {tuple(getattr(each.what, key) for key in keys): each.reason for each in flexmodel.open(outcome.run).refused}


def expect_same(found: dict, expected: dict, same=captures.same_bytes) -> None:
    assert len(expected) > 0 and found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())
    assert [key for key, value in expected.items() if not same(found[key].tensor(), value.tensor())] == []


@pytest.fixture(scope="module")
def compiled(run_once):
    return run_once(harness.python("compiled_cases.py", "compiled", *SPECS), HOOKS).expect(0)


@pytest.fixture(scope="module")
def plain(run_once):
    return run_once(harness.python("compiled_cases.py", "plain", *SPECS), HOOKS).expect(0)


def test_what_modules_do_is_captured_to_the_last_bit(compiled, plain):
    of_aot = [{k: v for k, v in by_model(each).items() if k[0] != FUSED} for each in (compiled, plain)]
    expect_same(*of_aot)
    assert refused(compiled) == refused(plain)
    assert compiled.losses[: 3 * FUSED] == plain.losses[: 3 * FUSED]


def test_a_model_compiled_by_inductor_is_captured(compiled, plain):
    expect_same(
        *({k: v for k, v in by_model(each).items() if k[0] == FUSED} for each in (compiled, plain)), captures.close
    )


def test_the_compiler_and_the_job_do_what_they_do_untapped(compiled, untapped_once):
    without = untapped_once(harness.python("compiled_cases.py", "compiled", *SPECS))
    assert len(compiler(without)) == len(SPECS) and compiler(compiled) == compiler(without)
    for at, spec in enumerate(SPECS):
        same = captures.close_losses if at == FUSED else list.__eq__
        losses = [each.losses[3 * at : 3 * at + 3] for each in (compiled, without)]
        assert len(losses[1]) == 3 and (spec.startswith("some_") or same(*losses)), spec


def test_compiled_models_on_two_ranks(run_once, untapped_once):
    program = harness.on_ranks("compiled_parallel.py", "compiled", *PARALLEL)
    outcome, without = run_once(program, PARALLEL_HOOKS).expect(0), untapped_once(program)
    plain = run_once(harness.on_ranks("compiled_parallel.py", "plain", *PARALLEL), PARALLEL_HOOKS).expect(0)
    assert len(compiler(without)) == len(PARALLEL) and compiler(outcome) == compiler(without)
    assert outcome.losses == plain.losses
    changed = [n for n, losses in enumerate(zip(outcome.losses, without.losses, strict=True)) if len(set(losses)) > 1]
    assert changed == [EDITED]
    # DDP has each bucket compiled by itself, and a bucket may end inside of a module: the run says what is missing.
    missing, found, expected = refused(outcome), by_model(outcome), by_model(plain)
    assert {(key[0], key[2]) for key in missing} == {(DDP, "backward")}
    assert all("torch._dynamo.config.optimize_ddp" in why for why in missing.values())
    assert len(expected) == len(found) + len(missing)
    expect_same(found, {key: value for key, value in expected.items() if key[:5] not in missing})
    assert any(key[0] == DDP and key[2] == "backward" for key in found)
