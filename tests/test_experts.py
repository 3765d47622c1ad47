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
HOOKS += ";layers.1.mlp.experts.*:param,grad"
ARGV = harness.torchrun("moe.py", "global", "local")


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


@pytest.fixture(scope="module")
def run(run_once):
    return captures.expect_sound(run_once(ARGV, HOOKS).expect(0).run)


def test_losses_are_bitwise_those_of_the_untapped_job(run_once, untapped_once, expected):
    outcome = run_once(ARGV, HOOKS).expect(0)
    assert outcome.losses == untapped_once(ARGV).losses
    assert captures.close_losses(outcome.losses, expected.losses * 2)


def test_whole_tensors_are_those_of_one_process_that_has_all_experts(run, expected):
    found = {
        captures.Key(r.module, r.kind, r.path, r.step, r.micro, r.call, r.train): r.tensor()
        for r in run.records
        if r.model == 0 and r.kind not in ("param", "grad")
    }
    captures.expect_close(found, expected.records)


def test_an_expert_is_whole_on_its_rank_and_absent_where_it_had_no_token(run):
    records = [r for r in run.records if r.model == 0]
    assert {r.module: r.ranks for r in records if r.module in EXPERTS} == {
        f"layers.1.mlp.experts.{n}": (n // 2,) for n in range(moe.EXPERTS)
    }
    assert {r.step for r in records if r.module == "layers.1.mlp.experts.3"} == {1}
    assert {r.step for r in records if r.module == "layers.1.mlp.experts.2"} == {0, 1}
    assert all(r.ranks == (0, 1) for r in records if r.module == "layers.1.mlp")


def test_parameters_of_an_expert_are_those_of_one_process(run, expected):
    for kind, values in (("param", expected.params), ("grad", expected.grads)):
        found = {(r.module, r.step): r.tensor() for r in run.records if r.kind == kind and r.model == 0}
        captures.expect_close(found, {key: value for key, value in values.items() if ".experts." in key[0]})


def test_the_command_shows_an_expert_and_the_modules_of_every_rank(run):
    harness.run([harness.FLEXMODEL, "show", str(run.path), "layers.1.mlp.experts.2", "--model", "0"]).expect(0)
    names = [module.name for module in run.models[0].modules]
    experts = [name for name in names if name in EXPERTS]
    assert experts == sorted(EXPERTS), "in the order of the whole model"
    assert names.index(experts[-1]) < names.index("lm_head")


def test_different_experts_of_one_name_are_kept_apart(run, expected):
    """Whatever the numbers of their tokens, which may be those of a batch."""
    seen = 0
    for record in run.records:
        local = record.module.removeprefix("layers.1.mlp.experts.")
        if record.model == 0 or local == record.module or record.kind != "forward":
            continue
        name, _, rest = local.partition(".")
        step = record.step - moe.STEPS
        for rank in record.ranks:
            module = f"layers.1.mlp.experts.{2 * rank + int(name)}" + (f".{rest}" if rest else "")
            seen += 1
            key = next(k for k in expected.records if (k.module, k.kind, k.step) == (module, "forward", step))
            captures.expect_close({key: record.part(rank)}, {key: expected.records[key]})
        with pytest.raises(KeyError, match=r"no part of rank 1|is not known"):
            record.tensor()
    assert seen == 2 * (2 * moe.EXPERTS - 1)


def test_an_expert_is_whole_where_nothing_else_is_captured(run_once, expected):
    """Its rank alone has tensors, and the other says only that it has no such module."""
    outcome = run_once(harness.on_ranks("moe.py", "global"), "layers.1.mlp.experts.2.act").expect(0)
    found = {key: value for key, value in expected.records.items() if key.module == "layers.1.mlp.experts.2.act"}
    run = flexmodel.open(outcome.run)
    assert run.info.owners[0].ranks != run.info.owners[1].ranks
    captures.expect_close(
        captures.read(outcome.run), {key: value for key, value in found.items() if key.kind == "forward"}
    )
