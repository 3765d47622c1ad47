"""Every way of wrapping a model gives the same whole tensors, under the names of the model as written."""

import flexmodel
import pytest
import tiny

import captures
import harness
import layouts
import reference_runs


@pytest.fixture(scope="module")
def expected():
    return reference_runs.data_parallel(tiny.build(), layouts.MODULES.__contains__, steps=layouts.STEPS)


@pytest.mark.parametrize("name", layouts.WRAPPED)
def test_loss_is_bitwise_that_of_one_process(name, run_once, expected):
    argv, number = layouts.WRAPPED[name]
    losses = run_once(argv, layouts.HOOKS).expect(0).losses
    assert losses[number * layouts.STEPS :][: layouts.STEPS] == expected[1]


CALLED = {"ddp": "DDP", "fsdp1-flat": "FSDP1", "fsdp2": "FSDP2", "zero1": "DeepSpeed ZeRO-1", "accelerate": "DDP"}


@pytest.mark.parametrize("name", CALLED)
def test_a_run_says_how_its_first_model_was_wrapped(name, run_once):
    assert flexmodel.open(run_once(layouts.WRAPPED[name][0], layouts.HOOKS).expect(0).run).info.wrapper == CALLED[name]


@pytest.mark.parametrize("name", layouts.WRAPPED)
def test_whole_tensors_equal_the_one_process_reference(name, run_once, expected):
    argv, number = layouts.WRAPPED[name]
    outcome = run_once(argv, layouts.HOOKS).expect(0)
    captures.expect_sound(outcome.run)
    captures.expect_equal(layouts.tensors(outcome, number), expected[0])


def test_one_process_without_torch_distributed(run_once):
    wanted = layouts.MODULES.__contains__
    found, losses = reference_runs.data_parallel(tiny.build(), wanted, steps=layouts.STEPS, sizes=(4,))
    outcome = run_once(harness.python("plain.py"), layouts.HOOKS).expect(0)
    assert outcome.losses == losses
    run = captures.expect_sound(outcome.run)
    assert run.info.world == 1
    assert all(record.dp_size == 1 for record in run.records)
    captures.expect_equal(layouts.tensors(outcome), found)


def test_the_dp_size_turns_gradients_into_those_of_the_whole_batch(run_once):
    whole, _ = reference_runs.data_parallel(tiny.build(), layouts.MODULES.__contains__, steps=1, whole=True)
    outcome = run_once(layouts.WRAPPED["ddp"][0], layouts.HOOKS).expect(0)
    records = [r for r in flexmodel.open(outcome.run).records if r.step == 0 and r.kind.startswith("backward")]
    assert records
    for record in records:
        key = captures.Key(record.module, record.kind, record.path, 0)
        captures.expect_close({key: record.tensor() / record.dp_size}, {key: whole[key]})


def test_layout_says_which_rows_came_from_which_rank(run_once):
    outcome = run_once(layouts.WRAPPED["ddp"][0], layouts.HOOKS).expect(0)
    record = next(r for r in flexmodel.open(outcome.run)["layers.0.mlp"] if r.kind == "forward")
    assert record.ranks == (0, 1)
    assert [(axis.name, axis.size) for axis in record.layout] == [("dp", 2)]
    assert record.shape == (8, tiny.SEQ, tiny.WIDTH)
    assert record.part(1).shape == (4, tiny.SEQ, tiny.WIDTH)
