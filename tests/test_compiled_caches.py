"""Folders of what torch.compile saved, shared by tapped jobs and others: whoever came first, each is as if alone."""

import pathlib

import pytest

import captures
import harness

ALL = "forward,forward_pre,backward,backward_pre"
# Two jobs' hooks, of which one edits. `first` is a graph without taps.
HOOKS = f"block:{ALL};block.up:{ALL}"
OTHERS = f"block:forward|scale(0.5);block.down:{ALL}"
# What a model that is called twice gives with HOOKS, before it is compiled ahead of time.
CALLED = {(module, "forward", call) for module in ("block", "block.up") for call in range(2)}
CASES = {
    # The job's name has torch keep a profile of shapes, too.
    "graphs": (harness.python("cached.py", "train"), {"TORCH_COMPILE_JOB_ID": "job"}),
    "packages": (harness.python("cached.py", "infer"), {"TORCH_CACHING_PRECOMPILE": "1"}),
}


class Folder:
    """A cache's folder, and jobs that share it."""

    def __init__(self, path: pathlib.Path, case: str) -> None:
        self.path = path
        self.argv, env = CASES[case]
        self.env = env | {"TORCHINDUCTOR_CACHE_DIR": str(path / "cache"), "SAVE_ARTIFACTS": "1"}
        self.runs = 0

    def untapped(self) -> harness.Outcome:
        return harness.run(self.argv, harness.environment(**self.env)).expect(0)

    def tapped(self, hooks: str) -> harness.Outcome:
        self.runs += 1
        return harness.tapped(self.argv, hooks, self.path / f"run{self.runs}", **self.env).expect(0)

    def files(self) -> dict[str, bytes]:
        """What the jobs saved."""
        return {str(file): file.read_bytes() for file in (self.path / "cache").rglob("*") if file.is_file()}


def caches(outcome: harness.Outcome) -> list[str]:
    return [line for line in outcome.out.splitlines() if line.startswith("caches")]


def with_taps(files: dict[str, bytes], before: dict[str, bytes]) -> list[str]:
    """Files that are new or others, and say that there are taps in them."""
    return [name for name, text in files.items() if before.get(name) != text and b"flexmodel" in text]


@pytest.fixture(scope="module")
def untapped_first(tmp_path_factory):
    """By case, a folder that untapped jobs had first, and what became of two of them."""
    done = {}

    def first(case: str) -> tuple[Folder, harness.Outcome, harness.Outcome]:
        if case not in done:
            folder = Folder(tmp_path_factory.mktemp("untapped"), case)
            done[case] = folder, folder.untapped(), folder.untapped()
            assert caches(done[case][1]) != caches(done[case][2]), "torch finds nothing again: nothing is tested"
        return done[case]

    return first


@pytest.fixture(scope="module")
def tapped_first(tmp_path_factory):
    """By case, a folder that tapped jobs had first, what became of one with OTHERS, and of two with HOOKS after it."""
    done = {}

    def first(case: str) -> tuple[Folder, harness.Outcome, harness.Outcome, harness.Outcome]:
        if case not in done:
            folder = Folder(tmp_path_factory.mktemp("tapped"), case)
            done[case] = folder, *(folder.tapped(hooks) for hooks in (OTHERS, HOOKS, HOOKS))
        return done[case]

    return first


def expect_alike(found: harness.Outcome, expected: harness.Outcome) -> None:
    """Equal after others than the expected one came after, so that neither has anything of them."""
    assert found.losses == expected.losses
    tensors = captures.read(expected.run)
    assert {key.module for key in tensors} > {"block"}
    captures.expect_equal(captures.read(found.run), tensors)
    captures.expect_sound(found.run)


def test_hooks_that_match_nothing_leave_torchs_own_keys(untapped_first):
    folder, _, again = untapped_first("graphs")
    before = folder.files()
    found = folder.tapped("nothing.of.it")
    assert (found.losses, caches(found)) == (again.losses, caches(again))
    assert with_taps(folder.files(), before) == []


@pytest.mark.parametrize("case", CASES)
def test_a_tapped_job_captures_all_after_others(case, untapped_first, tapped_first):
    folder, _, again = untapped_first(case)
    _, others, hooks, _ = tapped_first(case)
    expect_alike(folder.tapped(HOOKS), hooks)
    expect_alike(folder.tapped(OTHERS), others)
    assert hooks.losses != others.losses
    found = folder.untapped()
    assert (found.losses, caches(found)) == (again.losses, caches(again))


@pytest.mark.parametrize("case", CASES)
def test_a_tapped_job_finds_its_own_again(case, tapped_first):
    _, _, first, again = tapped_first(case)
    expect_alike(again, first)


@pytest.mark.parametrize("case", CASES)
def test_an_untapped_job_is_as_if_no_tapped_one_had_been(case, untapped_first, tapped_first):
    _, first, again = untapped_first(case)
    folder, *_ = tapped_first(case)
    before = folder.files()
    found = folder.untapped()
    assert found.losses == first.losses
    assert with_taps(folder.files(), before) == []
    found = folder.untapped()
    assert (found.losses, caches(found)) == (again.losses, caches(again))


def test_what_is_compiled_ahead_of_time_goes_from_job_to_job_without_taps(tmp_path):
    def cached(how: str, file: str, hooks: str | None = None) -> harness.Outcome:
        argv = harness.python("cached.py", how, str(tmp_path / file))
        env = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
        if hooks is None:
            return harness.run(argv, harness.environment(**env)).expect(0)
        return harness.tapped(argv, hooks, tmp_path / f"{how}-{file}", **env).expect(0)

    saved = [cached("save", "untapped"), cached("save", "tapped", HOOKS)]
    assert b"flexmodel" not in (tmp_path / "tapped").read_bytes()
    loaded = [cached("load", "tapped"), cached("load", "untapped"), cached("load", "untapped", HOOKS)]
    assert len({tuple(outcome.losses) for outcome in (*saved, *loaded)}) == 1
    for tapped in (saved[1], loaded[2]):
        assert "compiled ahead of time (aot_compile) are not captured" in tapped.err
        run = captures.expect_sound(tapped.run)
        assert {(r.module, r.kind, r.step) for r in run.records if r.path == "out"} == CALLED


def test_vllms_keys_have_the_hooks_in_them(tmp_path):
    """With a stand-in for the module of vLLM's that its keys come from."""
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").touch()
    (tmp_path / "vllm" / "envs.py").write_text("def compile_factors():\n    return {'VLLM_X': '1'}\n")
    argv, env = harness.python("cached.py", "factors"), {"PYTHONPATH": str(tmp_path)}

    def factors(hooks: str | None, name: str = "") -> str:
        if hooks is None:
            outcome = harness.run(argv, harness.environment(**env)).expect(0)
        else:
            outcome = harness.tapped(argv, hooks, tmp_path / name, **env).expect(0)
        return next(line for line in outcome.out.splitlines() if line.startswith("factors"))

    assert factors(None) == "factors ('VLLM_X', '1')"
    found = factors(HOOKS, "one")
    assert "('VLLM_X', '1')" in found and "FLEXMODEL" in found
    assert factors(HOOKS, "two") == found and factors(OTHERS, "three") != found
