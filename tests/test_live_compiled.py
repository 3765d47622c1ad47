"""Hooks that change in a job whose modules torch.compile has compiled: each graph that lacks one is made anew once.

The program prints with each step how often torch.compile has compiled. A change is a real command's.
"""

import itertools
import json
import pathlib

import flexmodel
import live_compiled
import pytest
import torch

import captures
import harness

ALL = "forward,forward_pre,backward,backward_pre"
WAYS = ("model", "itself", "function", "blocks")
# What is compiled without a change is compiled in the steps before this one.
WARM = 6


class Live:
    """A job that trains until it is told to stop, `per_call` steps for each loss."""

    def __init__(self, folder: pathlib.Path, ways: str, *options: str, hooks: str = "") -> None:
        self._run, self.folder = folder / "run", folder
        self._per_call = 3 if ways == "steps" else 1
        argv = harness.python("live_compiled.py", ways, str(folder), *options)
        command = [harness.FLEXMODEL, "run", "--hooks", hooks, "--out", str(self._run), "--", *argv]
        self._job = harness.Job(command, harness.environment())

    def __enter__(self) -> "Live":
        self._job.__enter__()
        self.reach(WARM)
        return self

    def __exit__(self, *exc) -> None:
        self._job.__exit__(*exc)

    def reach(self, step: int) -> None:
        """Returns once a step has ended."""
        self._job.wait_for_line(f"step {step // self._per_call} ")

    def ask(self, *args: str) -> harness.Outcome:
        return harness.run([harness.FLEXMODEL, "hooks", str(self._run), *args, "--json"])

    def change(self, *args: str) -> int:
        """Changes the hooks, and returns the step that this began with, once that and another have ended."""
        step = json.loads(self.ask(*args).expect(0).out)["step"]
        self.reach(step + self._per_call)
        return step

    def hold(self) -> None:
        """Returns once it begins no step, until `go_on`."""
        (self.folder / "hold").touch()
        self._job.wait_for_line("held")

    def go_on(self) -> None:
        (self.folder / "hold").unlink()

    def end(self) -> harness.Outcome:
        (self.folder / "end").touch()
        outcome = self._job.wait().expect(0)
        outcome.run = self._run
        return outcome


def compiles(outcome: harness.Outcome) -> tuple[int, dict[int, int]]:
    """How often it compiled in the first steps, and how often in each one after these."""
    counts = [int(line.split()[5]) for line in outcome.out.splitlines() if line.startswith("step ")]
    more = {step: now - before for step, (before, now) in enumerate(itertools.pairwise(counts), 1)}
    return counts[WARM - 1], {step: count for step, count in more.items() if step >= WARM and count > 0}


def notices(outcome: harness.Outcome) -> list[str]:
    return [line for line in outcome.err.splitlines() if "compiled again" in line]


class Eager:
    """The same models, trained here without FlexModel and uncompiled: their losses, and what modules do."""

    def __init__(self, models: int, modules: set[str], steps: int, per_call: int = 1) -> None:
        self.losses: list[str] = []
        self.seen: dict[tuple[int, str, str, int], torch.Tensor] = {}
        self._step = 0
        made, optimizer = live_compiled.models_of(models)
        for number, model in enumerate(made):
            for name in modules:
                self._watch(number, name, model.get_submodule(name))
        step = live_compiled.step_of(made, optimizer)
        for call in range(steps // per_call):
            x = live_compiled.batch(call)
            for _ in range(per_call):
                loss = step(x)
                self._step += 1
            self.losses.append(loss.item().hex())

    def _watch(self, number: int, name: str, module: torch.nn.Module) -> None:
        def see(kind: str, tensor: torch.Tensor) -> None:
            self.seen[number, name, kind, self._step] = tensor.detach().clone()

        module.register_forward_pre_hook(lambda _, args: see("forward_pre", args[0]))
        module.register_forward_hook(lambda _, args, out: see("forward", out))
        module.register_full_backward_hook(lambda _, into, __: see("backward", into[0]))
        module.register_full_backward_pre_hook(lambda _, out: see("backward_pre", out[0]))


def expect_records(outcome: harness.Outcome, eager: Eager, same=captures.same_bytes) -> dict:
    """They are what modules do. The steps of which there are records of a kind of a module of a model."""
    steps: dict[tuple[int, str, str], list[int]] = {}
    for each in flexmodel.open(outcome.run).records:
        place = (each.model, each.module, each.kind)
        assert same(each.tensor(), eager.seen[(*place, each.step)]), each
        steps.setdefault(place, []).append(each.step)
    return {place: sorted(each) for place, each in steps.items()}


def eager_as(outcome: harness.Outcome, models: int = 1, per_call: int = 1) -> Eager:
    modules = {each.module for each in flexmodel.open(outcome.run).records}
    return Eager(models, modules, len(outcome.losses) * per_call, per_call)


def expect_as_eager(outcome: harness.Outcome, models: int = 1) -> dict:
    """As `expect_records`, and losses are those of a job that compiles nothing too, to the last bit."""
    eager = eager_as(outcome, models)
    assert outcome.losses == eager.losses
    return expect_records(outcome, eager)


def test_hooks_come_and_go_and_come_again(tmp_path):
    with Live(tmp_path, ",".join(WAYS), "fullgraph", "strict") as job:
        added = job.change("add", "blocks.1.up:forward")
        removed = job.change("remove", "1")
        again = job.change("add", "blocks.1.up:forward")
        elsewhere = job.change("set", "blocks.0.up:forward")  # which shares a graph with it
        more = job.change("set", "blocks.1.up:backward")
        outcome = job.end()
    steps, last = expect_as_eager(outcome, len(WAYS)), len(outcome.losses)
    for model in range(len(WAYS)):
        assert steps.pop((model, "blocks.1.up", "forward")) == [*range(added, removed), *range(again, elsewhere)]
        assert steps.pop((model, "blocks.0.up", "forward")) == [*range(elsewhere, more)]
        assert steps.pop((model, "blocks.1.up", "backward")) == [*range(more, last)]
    assert steps == {}
    graphs, again_made = compiles(outcome)
    assert again_made == {added: graphs, more: graphs}
    first, second = notices(outcome)  # two models have one forward
    assert "3 compiled functions are compiled again for revision 1 of the hooks" in first and "revision 5" in second


def test_a_job_that_wants_no_recompilation_gets_more_hooks_than_the_limit_of_these(tmp_path):
    places = [f"blocks.{block}.{name}:" for block, name in ((0, "up"), (2, "down"), (1, "act"))]
    clauses = [place + kind for kind in ALL.split(",") for place in places][: torch._dynamo.config.recompile_limit + 2]
    with Live(tmp_path, "model,blocks", "fullgraph", "strict", "apart") as job:
        added = [job.change("add", clause) for clause in clauses]
        removed = job.change("remove", *map(str, range(1, len(clauses) + 1)))
        again = job.change("set", ";".join(reversed(clauses)))
        outcome = job.end()
    graphs, again_made = compiles(outcome)
    assert again_made == dict.fromkeys(added, graphs)
    steps, last = expect_as_eager(outcome, 2), len(outcome.losses)
    wanted = {clause: [*range(step, removed), *range(again, last)] for clause, step in zip(clauses, added, strict=True)}
    assert steps == {(model, *clause.split(":")): each for clause, each in wanted.items() for model in (0, 1)}


def test_a_job_that_lets_nothing_be_compiled_again_gets_no_hook_and_loses_some(tmp_path):
    hooks = "blocks.0.up:forward;blocks.0.down:forward"
    with Live(tmp_path, "model", "late=fail_on_recompile", hooks=hooks) as job:
        job.hold()
        (job.folder / "late").touch()
        job.go_on()
        job.reach(WARM + 20)
        refused = job.ask("add", "blocks.1.up:forward")
        removed = job.change("remove", "1")
        outcome = job.end()
    why = 'rank 0 cannot compile its modules again: torch.compiler.set_stance("fail_on_recompile") is in force'
    assert refused.code != 0 and why in refused.err, refused.text
    assert compiles(outcome) == (1, {}) and notices(outcome) == []
    steps = expect_as_eager(outcome)
    assert steps == {
        (0, "blocks.0.up", "forward"): [*range(removed)],
        (0, "blocks.0.down", "forward"): [*range(len(outcome.losses))],
    }


def test_a_job_that_forbids_it_after_it_took_a_hook_goes_on_without_that(tmp_path):
    with Live(tmp_path, "model", "late=fail_on_recompile", hooks="blocks.0.up:forward") as job:
        job.hold()
        step = json.loads(job.ask("add", "blocks.1.down:forward").expect(0).out)["step"]
        (job.folder / "late").touch()
        job.go_on()
        job.reach(step + 2)
        outcome = job.end()
    assert compiles(outcome) == (1, {})
    assert expect_as_eager(outcome) == {(0, "blocks.0.up", "forward"): [*range(len(outcome.losses))]}
    (notice,) = notices(outcome)
    assert "revision 1 of the hooks: 1 compiled module" in notice and '"fail_on_recompile") is in force' in notice


def test_a_job_that_compiles_later_gets_hooks(tmp_path):
    with Live(tmp_path, "model", "stance=eager_then_compile") as job:
        added = job.change("add", f"blocks.1.up:{ALL}")
        outcome = job.end()
    steps = expect_as_eager(outcome)
    assert len(steps) == 4 and all(each == [*range(added, len(outcome.losses))] for each in steps.values())


@pytest.mark.parametrize(("way", "per_call"), [("train", 1), ("steps", 3)])
def test_hooks_change_where_whole_steps_are_compiled(tmp_path, untapped_once, way, per_call):
    with Live(tmp_path, way) as job:
        changes = [("add", "blocks.1.up:forward"), ("remove", "1"), ("add", "blocks.1.up:forward")]
        added, removed, again = [job.change(*change) for change in changes]
        outcome = job.end()
    calls = len(outcome.losses)
    assert outcome.losses == untapped_once(harness.python("live_compiled.py", way, str(calls))).losses
    steps = expect_records(outcome, eager_as(outcome, per_call=per_call), captures.close)
    (found,) = steps.values()
    begun = [step for step in range(calls * per_call) if (step in found) != (step - 1 in found)]
    # In the middle of a compiled function they may begin with its next call.
    late = [step - said for step, said in zip(begun, (added, removed, again), strict=True)]
    assert all(0 <= steps < per_call for steps in late)
    assert list(compiles(outcome)[1].values()) == [1]


def test_what_inductor_compiled_gets_hooks(tmp_path):
    with Live(tmp_path, "model", "inductor") as job:
        added = job.change("add", "blocks.1.up:forward,backward")
        outcome = job.end()
    assert compiles(outcome) == (1, {added: 1})
    steps = expect_records(outcome, eager_as(outcome), captures.close)
    from_then_on = [*range(added, len(outcome.losses))]
    assert steps == {(0, "blocks.1.up", kind): from_then_on for kind in ("forward", "backward")}
