"""Of tensors that ranks hold alike one rank sends the bytes, the others a checksum; who drifts apart is named."""

import json

import flexmodel
import pytest

import captures
import harness
import layouts

HOOKS = "layers.0.mlp:param,grad"
UP = "layers.0.mlp.up.weight"


def lines(run) -> list[dict]:
    """The manifest's parts."""
    found = [json.loads(line)["rec"] for line in (run / "manifest.jsonl").read_text().splitlines()]
    return [rec for rec in found if rec["t"] == "part"]


@pytest.mark.parametrize(
    "argv, model, ranks, senders", [(layouts.WRAPPED["ddp"][0], 0, 2, {0}), (layouts.REPLICAS, 1, 4, {0, 1})]
)
def test_replicas_are_sent_once_and_every_rank_has_them(argv, model, ranks, senders, run_once):
    outcome = run_once(argv, layouts.HOOKS).expect(0)
    parts = [p for p in lines(outcome.run) if p["kind"] in ("param", "grad") and p["model"] == model]
    assert {p["rank"] for p in parts if "same" not in p} == senders
    assert {p["rank"] for p in parts if "same" in p} == set(range(ranks)) - senders
    run = captures.expect_sound(outcome.run)
    records = [r for r in run.records if r.kind in ("param", "grad") and r.model == model]
    assert all(record.complete and record.ranks == tuple(range(ranks)) for record in records)
    record = next(r for r in records if (r.module, r.kind) == (UP, "param"))
    held = [record.part(rank) for rank in range(ranks)]
    assert all(captures.same_bytes(held[rank], held[rank % len(senders)]) for rank in range(ranks))


def test_with_a_filter_on_ranks_every_rank_sends_its_own(run_once):
    outcome = run_once(harness.on_ranks("ddp.py"), f"{UP}:param@ranks=1").expect(0)
    assert not any("same" in p for p in lines(outcome.run))
    assert captures.expect_sound(outcome.run).get(UP, kind="param", step=1).shape == (128, 32)


def test_a_rank_that_drifts_apart_is_named_with_module_and_step(run_once):
    outcome = run_once(harness.on_ranks("drifting.py"), HOOKS).expect(0)
    run = flexmodel.open(outcome.run)
    (found,) = run.divergences
    assert (found.module, found.kind, found.step, found.rank, found.against) == (UP, "param", 1, 1, 0)
    assert f"rank 1's {UP} param param at step 1 should be rank 0's and differs" in outcome.err
    assert ", 1 divergence in" in outcome.err
    assert run.get(UP, kind="param", step=0).shape == (128, 32)
    with pytest.raises(KeyError, match="ranks 0 and 1 hold replicas that differ"):
        run.get(UP, kind="param", step=1)
    assert "note: " in harness.run([harness.FLEXMODEL, "verify", str(outcome.run)]).expect(0).err
