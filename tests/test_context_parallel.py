"""Context parallel: pieces of sequences are joined where the user says how, and are kept apart where nobody does."""

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


def test_pieces_in_an_order_that_is_not_known_are_kept_and_never_joined(run_once, expected):
    """In zig-zag order each rank has two of four pieces. Taken for rows of a batch they would fit, wrongly."""
    run = captures.expect_sound(run_of("zigzag", run_once).run)
    order = [[0, 1, 2, 9, 10, 11], [3, 4, 5, 6, 7, 8]]
    seen = 0
    for key, whole in expected.records.items():
        if whole.dim() < 3 or key.kind not in ("forward", "forward_pre"):
            continue
        seen += 1
        record = next(r for r in run[key.module] if (r.kind, r.path, r.step) == (key.kind, key.path, key.step))
        with pytest.raises(KeyError, match="how they lie along cp is not known"):
            record.tensor()
        for rank, places in enumerate(order):
            torch.testing.assert_close(record.part(rank), whole[:, places])
    assert seen > 20


def test_pieces_of_a_sequence_that_only_the_user_knows_of(run_once, expected):
    outcome = run_of("contiguous", run_once)
    captures.expect_sound(outcome.run)
    told = {key: value for key, value in expected.records.items() if key.module not in OF_ONE_DIMENSION}
    captures.expect_close(captures.read(outcome.run), told)
