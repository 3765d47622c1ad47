"""Expert parallel: an expert is on one rank, has the tokens of all ranks, and none in some steps."""

import flexmodel
import moe
import pytest

import captures
import harness
import reference_parallel

EXPERTS = {f"layers.1.mlp.experts.{n}" for n in range(moe.EXPERTS)}
TAPPED = {"embed", "layers.0", "layers.1", "layers.1.mlp", "layers.1.mlp.router", "norm", "lm_head"}
TAPPED |= EXPERTS | {f"{name}.act" for name in EXPERTS}
HOOKS = ";".join(f"{name}:forward,forward_pre,backward,backward_pre" for name in sorted(TAPPED))
ARGV = harness.torchrun("moe.py")


@pytest.fixture(scope="module")
def expected():
    steps = iter(range(moe.STEPS))

    def loss_of(model, tokens, targets):
        moe.steer(model, next(steps))
        return reference_parallel.mean_loss(model, tokens, targets)

    with reference_parallel.alone():
        return reference_parallel.sliced(
            moe.build(), TAPPED.__contains__, steps=moe.STEPS, sizes=(sum(moe.SIZES),), loss_of=loss_of, ranks=2
        )


def test_losses_are_bitwise_those_of_the_untapped_job(run_once, untapped_once, expected):
    outcome = run_once(ARGV, HOOKS).expect(0)
    assert outcome.losses == untapped_once(ARGV).losses
    assert captures.close_losses(outcome.losses, expected.losses)


def test_whole_tensors_are_those_of_one_process_that_has_all_experts(run_once, expected):
    run = captures.expect_sound(run_once(ARGV, HOOKS).expect(0).run)
    for key, whole in expected.records.items():
        record = next(r for r in run[key.module] if (r.kind, r.path, r.step) == (key.kind, key.path, key.step))
        # Nothing on an expert's rank tells that no other rank has it.
        found = record.part(record.ranks[0]) if key.module.startswith("layers.1.mlp.experts.") else record.tensor()
        captures.expect_close({key: found}, {key: whole})


def test_an_expert_is_whole_on_its_rank_and_absent_where_it_had_no_token(run_once):
    records = flexmodel.open(run_once(ARGV, HOOKS).expect(0).run).records
    assert {r.module: r.ranks for r in records if r.module in EXPERTS} == {
        f"layers.1.mlp.experts.{n}": (n // 2,) for n in range(moe.EXPERTS)
    }
    assert {r.step for r in records if r.module == "layers.1.mlp.experts.3"} == {1}
    assert {r.step for r in records if r.module == "layers.1.mlp.experts.2"} == {0, 1}
    assert all(r.ranks == (0, 1) for r in records if r.module == "layers.1.mlp")
