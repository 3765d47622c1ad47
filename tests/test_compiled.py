"""Modules inside torch.compile: captured as where nothing is compiled, and the compiler does what it does without us.

The programs print how often torch.compile compiled, its graphs and its graph breaks: equal lines are equal counts.
"""

import flexmodel
import pytest
import tiny
import torch

import captures
import harness
import reference_runs

ALL = "forward,forward_pre,backward,backward_pre"
HOOKS = f"layers.*.mlp:{ALL};layers.*.attn.qkv:{ALL};layers.1:{ALL};lm_head:{ALL}"


def wanted(name: str) -> bool:
    return name in ("layers.1", "lm_head") or name.endswith((".mlp", ".qkv"))


def expect_close(found: dict, expected: dict) -> None:
    """The same records, whose values differ by what reordered arithmetic makes of them."""
    assert found.keys() == expected.keys(), sorted(expected.keys() ^ found.keys())
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")


def compiler(outcome: harness.Outcome) -> list[str]:
    """What the program tells of the compiler."""
    return [line for line in outcome.out.splitlines() if line.startswith("graphs")]


def expect_unchanged(outcome: harness.Outcome, without: harness.Outcome) -> None:
    """The compiler did the same, and so did the job: bitwise, as far as the compiler keeps bits."""
    assert compiler(without), without.text
    assert compiler(outcome) == compiler(without)
    losses = [[float.fromhex(loss) for loss in each.losses] for each in (outcome, without)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_a_compiled_model_is_captured_as_one_that_is_not(run_once, untapped_once):
    hows = ("wrapped-blocks", "backward")
    program = harness.python("compiled.py", "aot_eager", *hows)
    outcome = run_once(program, HOOKS).expect(0)
    expect_unchanged(outcome, untapped_once(program))
    captures.expect_sound(outcome.run)
    expected, _ = reference_runs.data_parallel(tiny.build(), wanted, steps=3, sizes=(4,))
    for number in range(len(hows)):
        shifted = {key._replace(step=key.step + 3 * number): value for key, value in expected.items()}
        expect_close(captures.read(outcome.run, model=number), shifted)


CASES = ("InPlace", "Structured", "Repeated", "Checkpointed", "Broken", "Outside", "Uneven", "Function")


def by_model(run: flexmodel.Run) -> dict:
    keys = ("model", "module", "kind", "path", "step", "micro", "call", "train", "repeat")
    return {tuple(getattr(record, key) for key in keys): record.tensor() for record in run.records}


@pytest.mark.parametrize(
    ("cases", "hooks"),
    [
        pytest.param(CASES, f"*.**:{ALL}", id="everything"),
        pytest.param(
            ("Uneven", "InPlace"),
            "*.parts.1.first:forward,backward;*.parts.3:forward,backward_pre;"
            "1.first:forward|scale(0.5);1.second:backward_pre|scale(3);1.act:forward_pre@steps=4..5|zero;"
            "1.second:backward|scale(2);0:forward,backward",
            id="some-and-edits",
        ),
    ],
)
def test_what_modules_do_is_captured_to_the_last_bit(cases, hooks, run_once, untapped_once):
    program = harness.python("compiled_cases.py", "aot_eager", *cases)
    outcome = run_once(program, hooks).expect(0)
    plain = run_once(harness.python("compiled_cases.py", "none", *cases), hooks).expect(0)
    assert compiler(outcome) == compiler(untapped_once(program))
    assert outcome.losses == plain.losses
    runs = [flexmodel.open(each.run) for each in (outcome, plain)]
    found, expected = map(by_model, runs)
    assert len(expected) > 0 and found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())
    assert [key for key, value in expected.items() if not captures.same_bytes(found[key], value)] == []
    assert runs[0].info.totals.refused == runs[1].info.totals.refused


def test_a_model_compiled_by_inductor_is_captured(run_once, untapped_once):
    program = harness.python("compiled_cases.py", "inductor", "Repeated")
    outcome = run_once(program, f"*.**:{ALL}").expect(0)
    expect_unchanged(outcome, untapped_once(program))
    plain = run_once(harness.python("compiled_cases.py", "none", *CASES), f"*.**:{ALL}").expect(0)
    expected = {k: v for k, v in by_model(flexmodel.open(plain.run)).items() if k[0] == CASES.index("Repeated")}
    first = 3 * CASES.index("Repeated")
    expected = {(0, *k[1:4], k[4] - first, *k[5:]): v for k, v in expected.items()}
    expect_close(by_model(flexmodel.open(outcome.run)), expected)


def test_compiled_models_on_two_ranks(run_once, untapped_once):
    program = harness.torchrun("compiled_parallel.py", "aot_eager", "fsdp2", "ddp")
    outcome = run_once(program, HOOKS).expect(0)
    expect_unchanged(outcome, untapped_once(program))
    captures.expect_sound(outcome.run)
    expected, _ = reference_runs.data_parallel(tiny.build(), wanted, steps=3)
    expect_close(captures.read(outcome.run, model=0), expected)
    # DDP has each bucket compiled by itself, and a bucket may end inside of a module.
    assert "makes several graphs of a tapped module" in outcome.err
    expected = {key._replace(step=key.step + 3): value for key, value in expected.items()}
    found = captures.read(outcome.run, model=1)
    missing = expected.keys() - found.keys()
    assert {key.kind for key in missing} == {"backward"}
    assert any(key.kind == "backward" for key in found)
    expect_close(found, {key: value for key, value in expected.items() if key not in missing})
