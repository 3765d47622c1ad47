"""Jobs that no wrapper and no mesh describes: ranks share the batch only if they were given different rows of it."""

import by_hand
import flexmodel
import pytest
import torch

import captures
import harness
import reference_parallel

HALVED = {f"layers.{i}.mlp.{name}" for i in range(2) for name in ("up", "act")}
"""With tensor parallelism a rank has half of the features that these give."""
TAPPED = {"embed", "norm", "lm_head", "layers.1", "layers.1.attn", "layers.1.mlp"} | HALVED
KINDS = "forward,forward_pre,backward,backward_pre"
HOOKS = ";".join(f"{name}:{KINDS}" for name in sorted(TAPPED)) + ";lm_head:param,grad"
WAYS = ["tensor", "data"]
ARGV = harness.on_ranks("by_hand.py", *WAYS)


@pytest.fixture(scope="module")
def run(run_once):
    return captures.expect_sound(run_once(ARGV, HOOKS).expect(0).run)


@pytest.fixture(scope="module")
def expected():
    sizes = {"tensor": (by_hand.ROWS,), "data": (by_hand.ROWS, by_hand.ROWS)}
    return {
        how: reference_parallel.sliced(
            by_hand.tiny.build(), TAPPED.__contains__, steps=by_hand.STEPS, sizes=sizes[how], first=n * by_hand.STEPS
        )
        for n, how in enumerate(WAYS)
    }


def test_losses_are_bitwise_those_of_the_untapped_job(run_once, untapped_once, expected):
    losses = run_once(ARGV, HOOKS).expect(0).losses
    assert losses == untapped_once(ARGV).losses
    assert captures.close_losses(losses, [loss for how in WAYS for loss in expected[how].losses])


def records(run: flexmodel.Run, how: str) -> dict:
    """Those of activations and their gradients."""
    found = (r for r in run.records if r.model == WAYS.index(how) and r.kind not in ("param", "grad"))
    return {(r.module, r.kind, r.path, r.step): r for r in found}


def test_rows_that_differ_are_a_batch_over_the_ranks(run, expected):
    found = records(run, "data")
    assert len(found) == len(expected["data"].records)
    assert all(record.dp_size == 2 for record in found.values())
    for key, whole in expected["data"].records.items():
        record = found[key.module, key.kind, key.path, key.step]
        captures.expect_close({key: record.tensor()}, {key: whole})


def test_ranks_that_were_given_the_same_are_never_joined_as_a_batch(run, expected):
    found = records(run, "tensor")
    assert len(found) == len(expected["tensor"].records)
    assert all(record.dp_size == 1 for record in found.values())
    whole, apart = set(), set()
    for key, tensor in expected["tensor"].records.items():
        record = found[key.module, key.kind, key.path, key.step]
        if record.complete:
            whole.add((key.module, key.kind))
            captures.expect_close({key: record.tensor()}, {key: tensor})
            continue
        apart.add((key.module, key.kind))
        with pytest.raises(KeyError, match=r"how they lie along dp is not known, .* each rank's part is kept"):
            record.tensor()
        halves = [record.part(rank) for rank in range(2)]
        if key.module in HALVED and halves[0].shape != tensor.shape:
            captures.expect_close({key: torch.cat(halves, -1)}, {key: tensor})
    # What all ranks hold alike is whole; halves of features are not, nor are addends of gradients, whatever they fit.
    assert {(name, "forward") for name in TAPPED - HALVED} <= whole
    assert {(name, "forward") for name in HALVED} <= apart
    assert {(f"layers.{i}.mlp.up", "backward") for i in range(2)} <= apart


def test_parameters_of_a_model_without_a_wrapper_are_whole_where_all_ranks_hold_the_same(run, expected):
    for how in WAYS:
        for kind, values in (("param", expected[how].params), ("grad", expected[how].grads)):
            found = [r for r in run["lm_head.weight"] if r.kind == kind and r.model == WAYS.index(how)]
            assert len(found) == by_hand.STEPS
            for record in found:
                key = "lm_head.weight", record.step
                captures.expect_close({key: record.tensor()}, {key: values[key]})


def test_the_command_tells_them_apart_as_the_package_does(run):
    """Statistics of a whole are there where it is, and the sealed shards name no other whole."""
    shown = harness.run([harness.FLEXMODEL, "show", str(run.path), "layers.1.mlp.up", "--step", "0", "--model", "0"])
    assert "how the parts lie along axis dp is not known" in shown.text
    names = {name for shard in run.path.glob("*.safetensors") for name in header(shard)}
    assert "lm_head:forward:out@model1.step2.micro0.call0" in names
    assert "layers.1.mlp.up:forward:out@model1.step2.micro0.call0" in names
    assert "layers.1.mlp.up:forward:out@model0.step0.micro0.call0" not in names


def header(shard) -> list[str]:
    """Names in a safetensors file."""
    import json

    with open(shard, "rb") as file:
        return list(json.loads(file.read(int.from_bytes(file.read(8), "little"))))
