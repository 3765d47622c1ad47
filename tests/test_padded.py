"""Batches that each rank pads to its own longest: every row where it is in one process, and nothing else."""

import json

import flexmodel
import padded
import pytest
import torch
import tp_llama

import captures
import harness
import reference

INSIDE = ("embed_tokens", "layers.0", "layers.1.self_attn", "layers.0.mlp.up_proj")
TAPPED = {"model", "lm_head", *(f"model.{name}" for name in INSIDE)}
HOOKS = ";".join(f"{name}:forward,forward_pre,backward,backward_pre" for name in sorted(TAPPED))
SIDES = ["right", "left"]


@pytest.fixture(scope="module")
def outcome(run_once):
    return run_once(harness.on_ranks("padded.py", *SIDES), HOOKS).expect(0)


@pytest.fixture(scope="module", params=SIDES)
def side(request):
    return request.param


@pytest.fixture(scope="module")
def expected(side):
    """Of one process with the rows of all ranks, and losses of the rows of each."""
    model = tp_llama.build()
    recorder = reference.Recorder(model, TAPPED.__contains__)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(padded.STEPS):
        recorder.forward_pass(step)
        ranks = padded.sequences(step)
        batch = padded.collate([row for rank in ranks for row in rank], side)
        labels = batch.pop("labels")
        logits = model(**batch, use_cache=False).logits
        parts = zip(logits.split(padded.SIZES), labels.split(padded.SIZES), strict=True)
        losses = [model.loss_function(a, b, vocab_size=model.config.vocab_size) for a, b in parts]
        optimizer.zero_grad()
        sum(losses).backward()
        for parameter in model.parameters():
            parameter.grad /= len(losses)
        optimizer.step()
    return recorder.found


def blanked(value: torch.Tensor, step: int, side: str) -> torch.Tensor:
    """Without what the ranks' own padding has not: along every dimension as long as the longest row of all."""
    longest, value, first = max(map(max, padded.lengths(step))), value.clone(), 0
    for rank in padded.lengths(step):
        rows = value[first : first + len(rank)]
        for dim in range(1, value.dim()):
            if value.shape[dim] == longest:
                missing = longest - max(rank)
                rows.narrow(dim, max(rank) if side == "right" else 0, missing).zero_()
        first += len(rank)
    return value


def test_every_row_is_that_of_one_process(outcome, side, expected):
    run = captures.expect_sound(outcome.run)
    first = padded.STEPS * SIDES.index(side)
    found, ragged = {}, set()
    for record in run.records:
        if record.model != SIDES.index(side):
            continue
        key = reference.Key(record.module, record.kind, record.path, record.step - first)
        if key not in expected or expected[key].shape[0] != sum(padded.SIZES):
            continue  # what has no rows
        found[key] = record.tensor(pad=0, side=side)
        ragged |= {key.step} if record.padded_shape is not None else set()
        assert record.padded_shape in (None, tuple(found[key].shape))
        nested = record.tensor(nested=True).unbind()
        begin = [found[key].shape[dim] - size if side == "left" else 0 for dim, size in enumerate(nested[0].shape, 1)]
        inside = [slice(at, at + size) for at, size in zip(begin, nested[0].shape, strict=True)]
        assert torch.equal(found[key][(0, *inside)], nested[0])
    assert ragged == {0, 1}
    rows = {key: value for key, value in expected.items() if value.shape[0] == sum(padded.SIZES)}
    captures.expect_close(found, {key: blanked(value, key.step, side) for key, value in rows.items()})


def test_what_is_asked_without_padding_names_the_way(outcome):
    run = flexmodel.open(outcome.run)
    with pytest.raises(flexmodel.NotCapturedError, match=r"\[5, 7..10, 32\].*`pad=0`.*`nested=True`"):
        run.get("model.embed_tokens", step=0)
    assert run.get("model.embed_tokens", step=2).shape == (5, 8, 32)


def test_the_commands_say_what_there_is(outcome):
    listed = harness.run([harness.FLEXMODEL, "ls", str(outcome.run)]).expect(0)
    assert "[5, 6..10, 32]" in listed.out and "its own longest" in listed.err
    rows = json.loads(harness.run([harness.FLEXMODEL, "ls", str(outcome.run), "--json"]).expect(0).out)["rows"]
    embedded = next(row for row in rows if row["module"] == "model.embed_tokens" and row["kind"] == "forward")
    assert embedded["shape"] == [[5, 6, 32], [5, 10, 32]] and embedded["incomplete"] == 0
