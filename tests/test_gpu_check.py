"""scripts/gpu-check without a GPU: it runs from what it packs, and each of its stages can fail."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import known
import pytest
from gpu_check import cost, driver, machine, report, runner, stages, values
from gpu_check.setting import Setting

import captures
import harness

SCRIPT = str(harness.ROOT / "scripts" / "gpu-check")


def script(*arguments: str, of: str = SCRIPT, **env: str) -> harness.Outcome:
    env = {"FLEXMODEL_PYTHON": str(harness.BIN / "python")} | env
    return harness.run([of, *arguments], harness.environment(**env), 4 * harness.TIMEOUT)


def test_what_it_packs_goes_through_every_stage_elsewhere(tmp_path):
    script("--pack", str(tmp_path / "payload.tar.gz"), FLEXMODEL_PREFIX=str(harness.VENV)).expect(0)
    assert (tmp_path / "payload.tar.gz").stat().st_size < 64 << 20
    there = tmp_path / "there"
    there.mkdir()
    subprocess.run(["tar", "-xzf", tmp_path / "payload.tar.gz", "-C", there], check=True)
    # Nothing of this checkout and no compiler, as on the machine that it is for.
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("bash", "realpath", "dirname"):
        (tools / tool).symlink_to(shutil.which(tool))
    out = tmp_path / "out"
    outcome = script("--dry-run", of=str(there / "scripts" / "gpu-check"), OUT=str(out), PATH=str(tools))
    outcome.expect(0)
    # A machine gives few files back.
    assert sorted(path.name for path in out.iterdir()) == ["log.txt", "results.json"]
    ended = json.loads((out / "results.json").read_text())
    assert [(each["name"], each["status"]) for each in ended] == [(stage.name, "ok") for stage in stages.ALL]
    assert (out / "log.txt").read_text() == outcome.out
    assert f"doctor: bridge: ok: {there}/bridges/" in outcome.out
    # What a dry run could not tell is said where it was to be told.
    silent = {each["name"] for each in ended if not each["needs_gpu"]}
    assert silent == {"reuse5", "reuse"}


def test_what_is_asked_for_wrongly_is_said():
    assert "no stage is called nothing" in script("nothing").expect(2).err
    assert "has no FlexModel in it" in script(FLEXMODEL_PREFIX="/nonexistent").expect(2).err
    assert "has no torch" in script(FLEXMODEL_PYTHON="/bin/false").expect(2).err


def test_stages_that_fail_or_hang_end_no_other(tmp_path, capsys):
    def fails(_setting: Setting) -> None:
        raise ValueError("wrong")

    def expects(setting: Setting) -> None:
        setting.expect(False, "one")
        setting.expect(True, "two")
        setting.fact("seen", 3)
        setting.expect_on_gpu(False, "four")

    def hangs(setting: Setting) -> None:
        child = subprocess.Popen(["sleep", "1000"])
        setting.fact("child", child.pid)
        time.sleep(1000)

    chosen = [
        runner.Stage(check.__name__, bound, check, "")
        for check, bound in ((fails, 60), (expects, 60), (hangs, 1), (lambda _setting: None, 60))
    ]
    with report.Report(tmp_path) as saying:
        runner.run(chosen, Setting(tmp_path, "cpu"), saying)
        runner.run(chosen[:1], Setting(tmp_path, "cpu"), saying, within=0)
    failed, expected, hung, fine, late = saying.stages
    assert (failed.status, failed.failures) == ("FAILED", ["ValueError: wrong"])
    assert (expected.status, expected.failures, expected.facts) == ("FAILED", ["one"], {"seen": 3})
    assert expected.needs_gpu == ["four"]
    assert hung.status == "over its bound"
    stat = pathlib.Path("/proc") / str(hung.facts["child"]) / "stat"
    assert not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"
    assert (fine.status, late.status) == ("ok", "left out")
    assert "ValueError: wrong" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "results.json").read_text())) == 5


def test_a_tensor_that_is_wrong_or_missing_is_named(run_once, monkeypatch):
    outcome = run_once(["python", str(harness.PROGRAMS / "known.py"), "reuse", "2", "cpu"], values.HOOKS).expect(0)
    run = captures.expect_sound(outcome.run)
    assert values.wrong(run, 2) == []
    assert values.wrong(run, 3) == [f"make.{n}, step 2: no record" for n in range(len(known.OUTPUTS))]
    right = known.value
    late = known.OUTPUTS.index((300_001, "float32", "plain"))

    def last_is_late(ramp, number, factor):
        value = right(ramp, number, factor)
        if number == late:
            value[-1] = -1
        return value

    monkeypatch.setattr(known, "value", last_is_late)
    wrong = values.wrong(run, 2)
    assert wrong[0] == f"make.{late}, step 0: {300_000.0 + late} for -1.0 at 300000 of 300001"
    assert len(wrong) == 2


LOAD = cost.Load("load", "*", 100, 4, 50, tapped=10, rounds=2, slab=8)


def times(load: cost.Load, tapped: float) -> dict[str, list[float]]:
    """Of steps of 10 ms of which tapped ones, but for those that do not count, take as many times as long."""
    seen = {name: [[10e-3, 2e-3, 5][at]] * cost.PERIOD * 3 for at, name in enumerate(("step", "host", "peak"))}
    for begin in range(cost.BEGIN, len(seen["step"]), cost.PERIOD):
        for step in range(begin, begin + load.tapped):
            first = load.tapped > 1 and step == begin
            seen["step"][step] = 1.0 if first else tapped * 10e-3
            seen["host"][step] = 1.0 if first else 2e-3 + load.taps * 7e-6
            seen["peak"][step] = 5 if first else 105
    return seen


@pytest.mark.parametrize("number", [10, 1])
def test_a_cost_is_that_of_the_tapped_steps(number):
    load = cost.dataclasses.replace(LOAD, tapped=number)
    found = cost.cost(load, times(load, 1.25))
    assert found.untapped == pytest.approx(10e-3)
    assert (found.ratio, *found.spread) == pytest.approx((1.25,) * 3)
    assert found.host == pytest.approx(7e-6)
    assert found.peak == 100
    # A single step is measured with the two behind it, in which its bytes leave.
    took = 12.5e-3 if number == 10 else 32.5e-3
    assert found.rate == pytest.approx(4 * 50 * 100 * 2 / took)


def test_what_costs_too_much_fails(tmp_path, monkeypatch):
    setting = Setting(tmp_path, "cuda", tmp_path)
    found = cost.cost(LOAD, times(LOAD, 1.25))
    monkeypatch.setattr(cost, "measure", lambda _setting, _load: (found, 0.5))
    cost._stage(setting, LOAD, ratio=1.02, host=6e-6)
    said = [what for kind, what in setting.noted() if kind == "failure"]
    assert [line.partition(" takes ")[0] for line in said[1:]] == ["not so: a tapped step", "not so: a tap"]
    assert said[0].startswith("0.500 of what was asked for is stored")
    cost._stage(setting, LOAD, ratio=1.26, host=8e-6, least=0.5)
    assert len(setting.noted()) == 3


def test_a_driver_that_does_otherwise_fails(tmp_path, monkeypatch):
    setting = Setting(harness.VENV, "cpu", tmp_path)
    monkeypatch.setitem(driver.CAPTURES, "query", True)
    monkeypatch.setitem(driver.CAPTURES, "register-relaxed", False)
    machine.captures(setting)
    said = [rest[0] for kind, *rest in setting.noted() if kind == "failure"]
    assert [line.split(":")[0] for line in said] == ["register-relaxed", "query"]


def test_memory_that_cannot_be_pinned_fails(tmp_path, monkeypatch):
    seen = driver.facts(driver.Host())
    seen |= {"register": 1, "exchange on a fresh thread": 3, "context of a fresh thread": True}
    monkeypatch.setattr(machine, "_driver", lambda *_: None)
    monkeypatch.setattr(machine, "_answer", lambda *_: seen)
    setting = Setting(harness.VENV, "cpu", tmp_path)
    machine.probe(setting)
    assert len([1 for kind, *_ in setting.noted() if kind == "failure"]) == 3


@pytest.mark.parametrize("faults", ["fail=ncclRecv:2:2", "fail=ncclCommInitRankConfig:4:2", ""])
def test_an_nccl_that_fails_is_seen(faults):
    argv = [str(harness.ROOT / "target" / "release" / "examples" / "probe"), standin(), "--host"]
    outcome = harness.run(argv, harness.environment(FLEXMODEL_NCCL_STANDIN=faults))
    outcome.expect(1 if faults else 0)
    assert outcome.out.endswith("as it has to be\n") == (not faults)


def standin() -> str:
    return os.environ.get("FLEXMODEL_STANDIN", str(harness.ROOT / "target" / "release" / "libnccl.so"))


def test_a_job_that_fails_fails_its_stage(tmp_path):
    setting = Setting(harness.VENV, "cpu", tmp_path)
    ended = setting.job([sys.executable, "-c", "import sys; print(1); sys.exit(3)"])
    assert ended == harness.Outcome(3, "1\n", "", pathlib.Path())
    assert [kind for kind, *_ in setting.noted()] == ["failure"]
