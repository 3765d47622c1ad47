"""Context parallel: pieces of sequences are joined in the order that torch knows, or where the user says how."""

import context_parallel
import pytest
import tiny
import torch

import captures
import harness
import reference_parallel

BLOCK = ["norm1", "attn", "attn.qkv", "mlp", "mlp.act"]
TAPPED = {"embed", "place", "norm", "lm_head", "layers.0", "layers.1"}
TAPPED |= {f"layers.{i}.{name}" for i in range(2) for name in BLOCK}
OF_ONE_DIMENSION = {"layers.0", "layers.1", "layers.0.attn", "layers.1.attn"}
"""These are given positions too, whose sequence is dimension 0."""
KINDS = "forward,forward_pre,backward,backward_pre"
HOOKS = {
    "torch": ";".join(f"{name}:{KINDS}" for name in sorted(TAPPED)),
    # Only its author can tell what a script did with its batch.
    "contiguous": ";".join(
        f"{name}:{KINDS}@shard={int(name != 'place')}@cp" for name in sorted(TAPPED - OF_ONE_DIMENSION)
    ),
}
ORDERS = ["zigzag", "plain", "sharded"]
ARGV = {"torch": harness.torchrun("context_parallel.py", *ORDERS)}
ARGV["contiguous"] = harness.on_ranks("context_parallel.py", "contiguous")


@pytest.fixture(scope="module")
def expected():
    """For each of the orders."""
    positions = torch.arange(tiny.SEQ)
    with reference_parallel.alone():
        return [
            reference_parallel.sliced(
                context_parallel.build(),
                TAPPED.__contains__,
                steps=context_parallel.STEPS,
                sizes=(context_parallel.ROWS,),
                loss_of=lambda model, tokens, targets: tiny.loss_of(model(tokens, positions), targets),
                ranks=2,
                first=number * context_parallel.STEPS,
            )
            for number in range(len(ORDERS))
        ]


def run_of(who: str, run_once) -> harness.Outcome:
    return run_once(ARGV[who], HOOKS[who]).expect(0)


def test_losses_are_bitwise_those_of_the_untapped_job(run_once, untapped_once, expected):
    untapped = untapped_once(harness.on_ranks("context_parallel.py", *ORDERS, "contiguous")).losses
    found = run_of("torch", run_once).losses + run_of("contiguous", run_once).losses
    assert found == untapped
    assert captures.close_losses(found, expected[0].losses * (len(ORDERS) + 1))


@pytest.mark.parametrize("model", range(len(ORDERS)), ids=ORDERS)
def test_sequences_that_torch_cut_are_whole(model, run_once, expected):
    run = captures.expect_sound(run_of("torch", run_once).run)
    captures.expect_close(captures.read(run.path, model), expected[model].records)
    places = {axis.place for r in run["embed"] if r.model == model for axis in r.layout}
    assert places == {"shard" if ORDERS[model] == "plain" else "head_tail"}


def test_pieces_are_joined_by_the_command_as_by_the_package(run_once, tmp_path):
    run, file = run_of("torch", run_once).run, tmp_path / "x.pt"
    harness.run([harness.FLEXMODEL, "export", str(run), "--to", "torch", str(file), "--step", "0"]).expect(0)
    exported = torch.load(file)
    whole = {key: value for key, value in captures.read(run, 0).items() if key.step == 0}
    assert whole
    for key, value in whole.items():
        name = f"{key.module}:{key.kind}:{key.path}@model0.step0.micro{key.micro}.call{key.call}"
        assert captures.same_bytes(exported[name], value), name


def test_pieces_of_a_sequence_that_only_the_user_knows_of(run_once, expected):
    outcome = run_of("contiguous", run_once)
    captures.expect_sound(outcome.run)
    told = {key: value for key, value in expected[0].records.items() if key.module not in OF_ONE_DIMENSION}
    captures.expect_close(captures.read(outcome.run), told)
