"""Context parallel: pieces of the sequence are put together in the sequence's order, also from zig-zag pieces."""

import context_parallel
import flexmodel
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
    "zigzag": ";".join(f"{name}:{KINDS}" for name in sorted(TAPPED)),
    # Only its author can tell what a script did with its batch.
    "contiguous": ";".join(
        f"{name}:{KINDS}@shard={int(name != 'place')}@cp" for name in sorted(TAPPED - OF_ONE_DIMENSION)
    ),
}


@pytest.fixture(scope="module")
def expected():
    positions = torch.arange(tiny.SEQ)
    with reference_parallel.alone():
        return reference_parallel.sliced(
            context_parallel.build(),
            TAPPED.__contains__,
            steps=context_parallel.STEPS,
            sizes=(context_parallel.ROWS,),
            loss_of=lambda model, tokens, targets: tiny.loss_of(model(tokens, positions), targets),
            ranks=2,
        )


def run_of(order: str, run_once) -> harness.Outcome:
    return run_once(harness.torchrun("context_parallel.py", order), HOOKS[order]).expect(0)


def test_losses_are_bitwise_those_of_the_untapped_job(run_once, untapped_once, expected):
    untapped = iter(untapped_once(harness.torchrun("context_parallel.py", *HOOKS)).losses)
    for order in HOOKS:
        outcome = run_of(order, run_once)
        assert outcome.losses == [next(untapped) for _ in range(context_parallel.STEPS)], order
        assert captures.close_losses(outcome.losses, expected.losses), order


def test_zigzag_pieces_come_out_in_the_order_of_the_sequence(run_once, expected):
    outcome = run_of("zigzag", run_once)
    captures.expect_sound(outcome.run)
    captures.expect_close(captures.read(outcome.run), expected.records)


def test_tokens_come_out_as_the_script_made_them(run_once):
    run = flexmodel.open(run_of("zigzag", run_once).run)
    tokens = next(r for r in run["embed"] if r.kind == "forward_pre" and r.step == 0)
    assert torch.equal(tokens.tensor(), tiny.batch(0, [context_parallel.ROWS], 0)[0])
    places = next(r for r in run["place"] if r.kind == "forward_pre" and r.step == 0)
    assert places.tensor().tolist() == list(range(tiny.SEQ))
    assert places.part(0).tolist() == [0, 1, 2, 9, 10, 11]


def test_pieces_of_a_sequence_that_only_the_user_knows_of(run_once, expected):
    outcome = run_of("contiguous", run_once)
    captures.expect_sound(outcome.run)
    told = {key: value for key, value in expected.records.items() if key.module not in OF_ONE_DIMENSION}
    captures.expect_close(captures.read(outcome.run), told)
