"""Every way of wrapping a model gives the same whole tensors, under the names of the model as written."""

import pytest
import tiny

import captures
import harness
import reference_runs

MODULES = ["embed", "layers.*.norm1", "layers.*.attn", "layers.*.mlp", "layers.*.mlp.act", "lm_head"]
HOOKS = ";".join(f"{name}:forward,forward_pre,backward,backward_pre" for name in MODULES)
TAPPED = {"embed", "lm_head"} | {
    f"layers.{i}.{name}" for i in range(2) for name in ("norm1", "attn", "mlp", "mlp.act")
}
STEPS = 3

WRAPPED = {
    "ddp": ["ddp.py"],
    "fsdp1-flat": ["fsdp1.py", "flat"],
    "fsdp1-orig": ["fsdp1.py", "orig"],
    "fsdp2": ["fsdp2.py"],
    "zero1": ["zero.py", "1"],
    "zero2": ["zero.py", "2"],
    "zero3": ["zero.py", "3"],
    "accelerate": ["accelerate_ddp.py"],
}


@pytest.fixture(scope="module")
def expected():
    return reference_runs.data_parallel(tiny.build(), TAPPED.__contains__, steps=STEPS)


@pytest.mark.parametrize("name", WRAPPED)
def test_loss_is_bitwise_that_of_the_untapped_job(name, run_once, untapped_once, expected):
    argv = harness.torchrun(*WRAPPED[name])
    outcome = run_once(argv, HOOKS).expect(0)
    assert outcome.losses == untapped_once(argv).losses == expected[1]


@pytest.mark.parametrize("name", WRAPPED)
def test_whole_tensors_equal_the_one_process_reference(name, run_once, expected):
    outcome = run_once(harness.torchrun(*WRAPPED[name]), HOOKS).expect(0)
    captures.expect_sound(outcome.run)
    captures.expect_equal(captures.read(outcome.run), expected[0])


def test_one_process_without_torch_distributed(run_once):
    found, losses = reference_runs.data_parallel(tiny.build(), TAPPED.__contains__, steps=STEPS, sizes=(4,))
    outcome = run_once(harness.python("plain.py"), HOOKS).expect(0)
    assert outcome.losses == losses
    run = captures.expect_sound(outcome.run)
    assert run.info.world == 1
    assert all(record.dp_size == 1 for record in run.records)
    captures.expect_equal(captures.read(outcome.run), found)


def test_the_dp_size_turns_gradients_into_those_of_the_whole_batch(run_once):
    whole, _ = reference_runs.data_parallel(tiny.build(), TAPPED.__contains__, steps=1, whole=True)
    outcome = run_once(harness.torchrun("ddp.py"), HOOKS).expect(0)
    import flexmodel

    records = [r for r in flexmodel.open(outcome.run).records if r.step == 0 and r.kind.startswith("backward")]
    assert records
    for record in records:
        key = captures.Key(record.module, record.kind, record.path, 0)
        captures.expect_close({key: record.tensor() / record.dp_size}, {key: whole[key]})


def test_layout_says_which_rows_came_from_which_rank(run_once):
    import flexmodel

    outcome = run_once(harness.torchrun("ddp.py"), HOOKS).expect(0)
    record = next(r for r in flexmodel.open(outcome.run)["layers.0.mlp"] if r.kind == "forward")
    assert record.ranks == (0, 1)
    assert [(axis.name, axis.size) for axis in record.layout] == [("dp", 2)]
    assert record.shape == (8, tiny.SEQ, tiny.WIDTH)
    assert record.part(1).shape == (4, tiny.SEQ, tiny.WIDTH)
