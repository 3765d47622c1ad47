"""Bridges: one for each torch, built with a C++ compiler alone, refused by name where they do not fit."""

import os
import shutil

import pytest

import captures
import harness


def test_the_list_names_the_bridge_of_this_environment():
    outcome = harness.run([harness.FLEXMODEL, "bridge", "list"]).expect(0)
    version = harness.run(["python", "-c", "import torch; print(torch.__version__)"]).expect(0).out.strip()
    assert version.split("+")[0] in outcome.out


def test_building_again_is_done_at_once():
    before = harness.bridge().stat().st_mtime_ns
    harness.run([harness.FLEXMODEL, "bridge", "build"]).expect(0)
    assert harness.bridge().stat().st_mtime_ns == before


COMPILER = """#!/bin/sh
echo "$*" >> {log}
while [ $# -gt 1 ]; do
    [ "$1" != -o ] || cp {bridge} "$2"
    shift
done
"""


def test_a_missing_bridge_is_built_before_the_job_starts(tmp_path):
    """By a compiler that takes what scripts/setup has built with the real one, which is minutes of work."""
    compiler, log = tmp_path / "compiler", tmp_path / "log"
    compiler.write_text(COMPILER.format(log=log, bridge=harness.bridge()))
    compiler.chmod(0o755)
    argv = harness.python("plain.py", "1")
    env = {"FLEXMODEL_BRIDGE_CACHE": str(tmp_path / "cache"), "CXX": str(compiler)}
    outcome = harness.tapped(argv, "lm_head", tmp_path / "x", **env).expect(0)
    assert list((tmp_path / "cache").glob("*/libflexmodel_torch.so"))
    assert "bridge" in outcome.err
    assert len(captures.read(tmp_path / "x")) == 1
    *compiled, linked = log.read_text().splitlines()
    sources = {path.name for path in (harness.HOME / "bridge").glob("*.cc")}
    assert {next(word for word in line.split() if word.endswith(".cc")).split("/")[-1] for line in compiled} == sources
    assert "libflexmodel_bridge.a" in linked and "-ltorch_python" in linked


def test_a_preloaded_job_takes_the_bridge_of_its_own_sources_out_of_a_shared_cache(tmp_path):
    argv, ours = harness.python("plain.py", "1"), harness.bridge()
    theirs = ours.parent.name[:-8] + "0badf00d"
    for folder in (tmp_path / "both" / theirs, tmp_path / "both" / ours.parent.name, tmp_path / "theirs" / theirs):
        folder.mkdir(parents=True)
        shutil.copy(ours, folder)
    for name, records in (("both", 1), ("theirs", 0)):
        with harness.agent(tmp_path / f"{name}.run", tmp_path / f"{name}.sock"):
            env = harness.preloaded("lm_head", tmp_path / f"{name}.sock", FLEXMODEL_BRIDGE_CACHE=str(tmp_path / name))
            outcome = harness.run(argv, env).expect(0)
        assert len(captures.read(tmp_path / f"{name}.run")) == records, outcome.text
        assert ("no bridge of ours for torch" in outcome.err) == (records == 0)


def test_without_a_compiler_the_line_says_what_to_install(tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("python", "python3", "flexmodel"):
        (tools / name).symlink_to((harness.BIN / name).resolve() if name == "flexmodel" else harness.BIN / name)
    env = harness.environment(PATH=str(tools), FLEXMODEL_BRIDGE_CACHE=str(tmp_path / "cache"), CXX=None)
    outcome = harness.run([harness.FLEXMODEL, "bridge", "build"], env)
    assert outcome.code != 0
    assert len(outcome.err.strip().splitlines()) == 1
    assert "g++" in outcome.err


def test_an_environment_without_torch_is_told_so(tmp_path):
    import subprocess
    import sys

    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    env = harness.environment()
    env["PATH"] = f"{tmp_path / 'bare' / 'bin'}:{env['PATH']}"
    outcome = harness.run([harness.FLEXMODEL, "bridge", "build"], env)
    assert outcome.code != 0
    assert len(outcome.err.strip().splitlines()) == 1
    assert "torch" in outcome.err


@pytest.mark.parametrize("how", ["writable", "another user's"])
def test_a_job_loads_no_bridge_that_others_could_have_put_there(how, tmp_path, untapped_once):
    argv, ours = harness.python("plain.py", "1"), harness.bridge()
    cache = tmp_path / "cache"
    (cache / ours.parent.name).mkdir(parents=True)
    shutil.copy(ours, cache / ours.parent.name)
    if how == "writable":
        cache.chmod(0o777)
    elif os.geteuid() == 0:
        os.chown(cache, 65534, -1)
    else:
        pytest.skip("NOT TESTED without root: a cache of another user's")
    for name, env in (
        ("cache", {"FLEXMODEL_BRIDGE_CACHE": str(cache)}),
        ("bridge", {"FLEXMODEL_BRIDGE": str(cache / ours.parent.name / ours.name)}),
    ):
        run = tmp_path / f"{name}.run"
        with harness.agent(run, tmp_path / f"{name}.sock"):
            outcome = harness.run(argv, harness.preloaded("lm_head", tmp_path / f"{name}.sock", **env)).expect(0)
        assert outcome.out == untapped_once(argv).out
        (line,) = [line for line in outcome.err.splitlines() if line.startswith("flexmodel:")]
        assert f"the bridge is not loaded: {cache} " in line and "who could put other code there" in line
        assert captures.read(run) == {}


def test_a_cache_below_a_folder_like_tmp_is_used(tmp_path):
    argv, ours = harness.python("plain.py", "1"), harness.bridge()
    (tmp_path / "tmp" / "cache" / ours.parent.name).mkdir(parents=True)
    (tmp_path / "tmp").chmod(0o1777)
    shutil.copy(ours, tmp_path / "tmp" / "cache" / ours.parent.name)
    cache = {"FLEXMODEL_BRIDGE_CACHE": str(tmp_path / "tmp" / "cache")}
    outcome = harness.tapped(argv, "lm_head", tmp_path / "x", **cache).expect(0)
    assert "building" not in outcome.err
    assert len(captures.read(tmp_path / "x")) == 1
