"""Several models in one script, and selectors that match nothing."""

import flexmodel
import models
import pytest
import tiny
import torch

import captures
import harness

STUDENT, TEACHER, CRITIC, GROWN = range(4)


@pytest.fixture(scope="module")
def outcome(run_once):
    return run_once(harness.python("models.py"), "layers.*.mlp;/^[02]$/").expect(0)


@pytest.fixture(scope="module")
def records(outcome):
    return sorted(flexmodel.open(outcome.run).records, key=lambda record: record.time_ns)


@pytest.fixture(scope="module")
def calls():
    """Outputs of the same script's selected modules, in the order of their calls."""
    seen = []

    def hook(module, _args, output):
        critic = isinstance(module, torch.nn.Linear) and module.weight.shape in ((8, tiny.VOCAB), (1, 8))
        if isinstance(module, tiny.Mlp) or critic:
            seen.append((module.training, output.detach().clone()))

    handle = torch.nn.modules.module.register_module_forward_hook(hook)
    try:
        models.main()
    finally:
        handle.remove()
    return seen


def test_the_script_computes_what_it_does_untapped(outcome, untapped_once):
    assert outcome.losses == untapped_once(harness.python("models.py")).losses


def test_every_model_is_found(records, calls):
    assert len(records) == len(calls)
    for record, (training, value) in zip(records, calls, strict=True):
        assert captures.same_bytes(record.tensor(), value), record
        assert record.train == training, record


def test_each_model_has_its_number(records):
    of = {(record.model, record.step, record.module) for record in records}
    mlps = {f"layers.{i}.mlp" for i in range(3)}
    assert {m for n, _, m in of if n == STUDENT} == {"layers.0.mlp", "layers.1.mlp"}
    assert {m for n, _, m in of if n == TEACHER} == {"layers.0.mlp", "layers.1.mlp"}
    assert {m for n, _, m in of if n == CRITIC} == {"0", "2"}
    assert {m for n, _, m in of if n == GROWN} == mlps
    assert {s for n, s, _ in of if n == STUDENT} == {0, 1}
    assert {s for n, s, _ in of if n == TEACHER} == {0, 1, 2}
    assert {s for n, s, _ in of if n == CRITIC} == {1, 2}
    assert {s for n, s, _ in of if n == GROWN} == {2}


def test_a_part_called_directly_after_the_model_is_one_more_call_of_it(records):
    direct = [r for r in records if r.shape == (2, tiny.WIDTH)]
    assert [(r.model, r.module, r.step, r.micro, r.call) for r in direct] == [
        (STUDENT, "layers.0.mlp", 0, 0, 1),
        (STUDENT, "layers.0.mlp", 1, 0, 1),
        (GROWN, "layers.0.mlp", 2, 0, 1),
    ]


def test_a_selector_without_match_is_reported_with_the_nearest_names(run_once, untapped_once):
    outcome = run_once(harness.python("plain.py"), "layers.*.mpl").expect(0)
    assert outcome.out == untapped_once(harness.python("plain.py")).out
    line = next(line for line in outcome.err.splitlines() if "layers.*.mpl" in line)
    assert "layers.0.mlp" in line or "layers.*.mlp" in line


def test_copies_of_copies_have_no_more_hooks_and_leave_nothing_behind(run_once, untapped_once):
    argv = harness.python("generations.py")
    outcome, untapped = run_once(argv, "layers.*.mlp;lm_head:forward_pre").expect(0), untapped_once(argv)
    assert outcome.losses == untapped.losses
    # The model's own, two modules' after, one's before.
    hooks = _printed(outcome, "hooks")
    half = len(hooks) // 2
    assert hooks[:half] == [[2, 2, 4, 4, 1]] * half
    # What torch.compile can trace is not called after an error.
    assert hooks[half + 1 :] == [[2, 2, 4, 4, 0]] * (half - 1)
    # Torch leaves some behind too. Six generations lie between two counts.
    ours, torchs = (_printed(o, "objects") for o in (outcome, untapped))
    for before, after in ((0, 1), (2, 3)):
        assert ours[after][0] - ours[before][0] < torchs[after][0] - torchs[before][0] + 6


def test_models_that_were_saved_hold_nothing_of_ours(tmp_path, run_once):
    """Who loads them has no FlexModel, and compiles them."""
    kinds = "**:forward,forward_pre"
    paths = [str(tmp_path / name) for name in ("untapped", "tapped")]
    untapped = harness.run(harness.python("saved.py", "save", paths[0])).expect(0)
    outcome = run_once(harness.python("saved.py", "save", paths[1]), kinds).expect(0)
    assert captures.expect_sound(outcome.run).records
    assert outcome.out == untapped.out
    loaded = [harness.run(harness.python("saved.py", "load", path)).expect(0).out for path in paths]
    assert loaded[0] == loaded[1]


def _printed(outcome, what: str) -> list[list[int]]:
    return [list(map(int, line.split()[1:])) for line in outcome.out.splitlines() if line.startswith(f"{what} ")]
