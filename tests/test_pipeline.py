"""Pipeline parallel: a module is on one stage, and a step's microbatches come out as its whole batch, in order."""

import flexmodel
import pipeline
import pipeline_dp
import pytest

import captures
import harness
import reference_parallel

BLOCK = ["norm1", "attn", "mlp", "mlp.act"]
TAPPED = {"embed", "norm", "lm_head"}
TAPPED |= {f"layers.{i}{name}" for i in range(pipeline.LAYERS) for name in ["", *(f".{part}" for part in BLOCK)]}
HOOKS_OF_PARTS = ";".join(f"{name}:forward,forward_pre,backward,backward_pre" for name in sorted(TAPPED))
HOOKS = HOOKS_OF_PARTS + ";(root):forward,forward_pre"
SCHEDULES = ["1F1B", "GPipe", "parts-1F1B", "traced-1F1B", "Interleaved1F1B", "LoopedBFS"]
ARGV = harness.torchrun("pipeline.py", *SCHEDULES)


@pytest.fixture(scope="module")
def outcome(run_once):
    return run_once(ARGV, HOOKS).expect(0)


@pytest.fixture(scope="module")
def run(outcome):
    return captures.expect_sound(outcome.run)


@pytest.fixture(scope="module")
def expected():
    steps = pipeline.STEPS
    options = {"steps": steps, "sizes": pipeline.SIZES, "total": reference_parallel.in_turn}
    return [
        reference_parallel.sliced(pipeline.build(), (TAPPED | {""}).__contains__, first=number * steps, **options)
        for number in range(len(SCHEDULES))
    ]


def records(run: flexmodel.Run, schedule: int) -> list[flexmodel.Record]:
    """Those of one schedule, which has its own steps."""
    return [r for r in run.records if r.step // pipeline.STEPS == schedule]


def test_losses_are_bitwise_those_of_one_process(outcome, expected):
    assert outcome.losses == [loss for whole in expected for loss in whole.losses]


@pytest.mark.parametrize("schedule", range(len(SCHEDULES)), ids=SCHEDULES)
def test_whole_batches_have_the_bytes_of_one_process(schedule, run, expected):
    found = {
        captures.Key(r.module, r.kind, r.path, r.step, r.micro, r.call, r.train): r.tensor()
        for r in records(run, schedule)
        if r.module
    }
    whole = {key: value for key, value in expected[schedule].records.items() if key.module}
    # Of a mean over a microbatch, a gradient is as many times that of a mean over the batch as there are microbatches.
    assert {r.dp_size for r in records(run, schedule) if r.module} == {len(pipeline.SIZES)}
    # It goes backward through the microbatches from last to first, and so sums parameters' gradients in that order.
    same = captures.close if SCHEDULES[schedule] == "LoopedBFS" else captures.same_bytes
    captures.expect_equal(found, whole, same)


@pytest.mark.parametrize("schedule", range(len(SCHEDULES)), ids=SCHEDULES)
def test_all_stages_are_in_one_run_and_each_module_is_on_one_rank(schedule, run):
    ranks = {record.module: record.ranks for record in records(run, schedule) if record.module}
    assert ranks.keys() == TAPPED
    looped = SCHEDULES[schedule] in ("Interleaved1F1B", "LoopedBFS")
    stages = [(0,), (1,), (0,), (1,)] if looped else [(0,), (0,), (1,), (1,)]
    assert [ranks[f"layers.{i}.mlp"] for i in range(pipeline.LAYERS)] == stages
    assert (ranks["embed"], ranks["lm_head"]) == ((0,), (1,))


@pytest.mark.parametrize("schedule", range(len(SCHEDULES)), ids=SCHEDULES)
def test_stages_are_models_of_one_name_and_each_is_read_by_its_rank(schedule, run, expected):
    roots = [r for r in records(run, schedule) if not r.module and r.step == schedule * pipeline.STEPS]
    with pytest.raises(KeyError, match="ranks 0 and 1 differ, and the layout does not tell them apart"):
        roots[0].tensor()
    first = next(r for r in roots if r.kind == "forward_pre")
    last = [r for r in roots if r.kind == "forward"][-1]
    for record, rank in ((first, 0), (last, 1)):
        whole = next(
            value for key, value in expected[schedule].records.items()
            if (key.module, key.kind, key.step) == ("", record.kind, record.step)
        )  # fmt: skip
        assert captures.same_bytes(record.part(rank), whole)


SHARED = ["ddp", "fsdp2"]
FOUR = harness.on_ranks("pipeline_dp.py", *SHARED, ranks=4)


@pytest.mark.parametrize("number", range(len(SHARED)), ids=SHARED)
def test_stages_whose_ranks_share_the_batch_have_whole_batches_parameters_and_gradients(number, run_once):
    outcome = run_once(FOUR, HOOKS_OF_PARTS + ";**:param,grad").expect(0)
    steps = range(number * pipeline_dp.STEPS, (number + 1) * pipeline_dp.STEPS)
    expected = reference_parallel.sliced(
        pipeline.build(), TAPPED.__contains__, steps=pipeline_dp.STEPS, sizes=(pipeline_dp.ROWS // 2,) * 4
    )
    wanted = {(*key[:3], key.step, key.micro): value for key, value in expected.records.items()}
    wanted |= {(name, "param", "param", step, 0): value for (name, step), value in expected.params.items()}
    wanted |= {(name, "grad", "grad", step, 0): value for (name, step), value in expected.grads.items()}
    found = [r for r in captures.expect_sound(outcome.run).records if r.step in steps]
    assert len(found) == len(wanted)
    for r in found:
        assert captures.close(r.tensor(), wanted[r.module, r.kind, r.path, r.step - steps.start, r.micro]), r
        assert r.kind in ("param", "grad") or r.dp_size == 4
    assert captures.close_losses([outcome.losses[step] for step in steps], expected.losses)
