"""With the preload in the environment, whatever else is wrong, commands and jobs behave as without it."""

import pathlib
import re
import subprocess

import flexmodel
import pytest

import captures
import harness

HOOKS = "**:forward,backward"


@pytest.fixture(scope="module")
def other_bridges(tmp_path_factory) -> dict[str, pathlib.Path]:
    """Bridges that say they were built for another torch, and from other sources."""
    real = harness.bridge()
    says = re.search(rb"FLEXMODEL-BRIDGE key=torch(\d)\S+ digest=([0-9a-f])", real.read_bytes())
    assert says, f"{real} names no torch"
    made = {}
    for name, digit in (("torch", 1), ("sources", 2)):
        data = bytearray(real.read_bytes())
        data[says.start(digit)] = ord("1") if data[says.start(digit)] != ord("1") else ord("0")
        made[name] = tmp_path_factory.mktemp(name) / real.name
        made[name].write_bytes(data)
    return made


def _variants(tmp_path: pathlib.Path, others: dict[str, pathlib.Path]) -> dict[str, dict[str, str]]:
    absent = tmp_path / "absent.sock"
    preload = {"LD_PRELOAD": str(harness.LIBRARY)}
    return {
        "no-hooks": harness.environment(**preload),
        "disabled": harness.preloaded(HOOKS, absent, FLEXMODEL_DISABLE="1"),
        "no-match": harness.preloaded("nothing.has.this.name", absent),
        "agent-absent": harness.preloaded(HOOKS, absent),
        "no-agent-named": harness.environment(**preload, FLEXMODEL_HOOKS=HOOKS),
        "bad-agent": harness.environment(**preload, FLEXMODEL_HOOKS=HOOKS, FLEXMODEL_AGENT="tcp:1"),
        "bad-hooks": harness.preloaded("a:b:c@@|", absent),
        "other-bridge": harness.preloaded(HOOKS, absent, FLEXMODEL_BRIDGE=str(others.get("torch", absent))),
        "other-sources": harness.preloaded(HOOKS, absent, FLEXMODEL_BRIDGE=str(others.get("sources", absent))),
        "no-bridge": harness.preloaded(HOOKS, absent, FLEXMODEL_BRIDGE=str(tmp_path / "none.so")),
        "not-a-bridge": harness.preloaded(HOOKS, absent, FLEXMODEL_BRIDGE=str(harness.LIBRARY)),
        "panic-in-load": harness.preloaded(HOOKS, absent, FLEXMODEL_TEST_FAULT="panic-in-load"),
        "panic-in-tap": harness.preloaded(HOOKS, absent, FLEXMODEL_TEST_FAULT="panic-in-tap"),
        "throw-in-tap": harness.preloaded(HOOKS, absent, FLEXMODEL_TEST_FAULT="throw-in-tap"),
    }


VARIANTS = list(_variants(pathlib.Path(), {}))


@pytest.fixture(scope="module")
def environments(tmp_path_factory, other_bridges) -> dict[str, dict[str, str]]:
    return _variants(tmp_path_factory.mktemp("variants"), other_bridges)


@pytest.fixture
def variant(request, environments) -> dict[str, str]:
    return environments[request.param]


@pytest.fixture(scope="module")
def trained(environments):
    """How the program of a variant ended."""
    done: dict[str, harness.Outcome] = {}

    def once(name: str) -> harness.Outcome:
        if name not in done:
            done[name] = harness.run(program(name), environments[name]).expect(0)
        return done[name]

    return once


WITH_WORKERS = ["no-hooks", "no-match", "panic-in-tap", "throw-in-tap"]
"""States in which the workers of a loader say nothing: the same job asks about them."""
LOADER = harness.python("loader.py", "fork", "spawn", "forkserver")


def program(variant: str) -> list[str]:
    """What a variant trains: with loader workers that are forked, spawned, and forked by a server, or without any."""
    return LOADER if variant in WITH_WORKERS else harness.python("plain.py")


@pytest.fixture(scope="module")
def programs(tmp_path_factory) -> dict[str, list[str]]:
    folder = tmp_path_factory.mktemp("programs")
    (folder / "hello.c").write_text('#include <stdio.h>\nint main(void) { puts("hello"); return 3; }\n')
    subprocess.run(["gcc", "-static", "-o", folder / "static", folder / "hello.c"], check=True)
    subprocess.run(["gcc", "-o", folder / "dynamic", folder / "hello.c"], check=True)
    return {
        "bash": ["bash", "-c", "echo $((6*7)); cat <(echo piped); exit 9"],
        "closed-descriptors": ["bash", "-c", "exec 0<&- 1>&- 2>&-; true"],
        "git": ["git", "-C", str(harness.ROOT), "--version"],
        "gcc": ["gcc", "-o", str(folder / "again"), str(folder / "hello.c")],
        "ldd": ["ldd", str(folder / "dynamic")],
        "static": [str(folder / "static")],
        "dynamic": [str(folder / "dynamic")],
        "python": ["python", "-c", "pass"],
        "python-fails": ["python", "-c", "raise SystemExit('no')"],
        "python-extensions": ["python", "-c", "import numpy, sqlite3, ssl; print(numpy.arange(3).sum())"],
        "sort": ["bash", "-c", "printf 'b\\na\\n' | sort | uniq -c"],
    }


@pytest.mark.parametrize("variant", VARIANTS, indirect=True)
def test_plain_commands_behave_as_without(variant, programs):
    """INERT-1."""
    for name, argv in programs.items():
        without, within = harness.run(argv), harness.run(argv, variant)
        if name == "ldd":  # it lists the preload, as the loader does; addresses vary
            without.out, within.out = (
                {line.split()[0] for line in o.out.splitlines()} - {str(harness.LIBRARY)} for o in (without, within)
            )
        assert (within.code, within.out, within.err) == (without.code, without.out, without.err), name


@pytest.mark.parametrize("name", VARIANTS)
def test_training_is_bitwise_the_same_and_says_at_most_one_line(name, trained, untapped_once):
    """OPEN-1."""
    without, within = untapped_once(program(name)), trained(name)
    assert without.losses and within.out == without.out
    ours = [line for line in within.err.splitlines() if line not in without.err.splitlines()]
    assert len(ours) <= 1, ours
    assert all(line.startswith("flexmodel:") for line in ours)


SPEAKING = ["no-match", "agent-absent", "other-bridge", "other-sources", "no-bridge", "not-a-bridge", "panic-in-load",
            "panic-in-tap", "throw-in-tap", "bad-hooks", "bad-agent"]  # fmt: skip


@pytest.mark.parametrize("name", SPEAKING)
def test_what_keeps_taps_from_working_is_said_once(name, trained):
    within = trained(name)
    said = [line for line in within.err.splitlines() if line.startswith("flexmodel:")]
    assert said, within.text
    if name == "other-sources":
        assert "from other sources" in said[0]


@pytest.mark.parametrize("variant", ["no-bridge", "panic-in-load"], indirect=True)
def test_a_job_whose_workers_speak_too_trains_bitwise_the_same(variant, untapped_once):
    within = harness.run(LOADER, variant).expect(0)
    assert within.out == untapped_once(LOADER).out
    assert "Traceback" not in within.err, within.text


@pytest.mark.parametrize("variant", ["agent-absent"], indirect=True)
def test_ranks_with_loader_workers_train_bitwise_the_same(variant, untapped_once):
    """Two ranks with taps, and workers that are forked, spawned, and forked by a server."""
    argv = harness.torchrun("workers.py")
    without = untapped_once(argv)
    assert len(without.losses) == 4
    within = harness.run(argv, variant).expect(0)
    assert within.out == without.out
    assert "Traceback" not in within.err, within.text


def test_loader_workers_stay_untouched(run_once, untapped_once):
    outcome = run_once(LOADER, "class=Linear;layers.*.mlp").expect(0)
    assert outcome.out == untapped_once(LOADER).out, "workers give the same rows"
    run = captures.expect_sound(outcome.run)
    assert run.info.world == 1
    assert len([r for r in run.records if r.class_name == "Mlp"]) == 2 * 3 * 4  # layers, loaders, steps
    assert "" not in run.modules, "the workers' own module was tapped"


def test_a_forked_child_is_off_and_the_parent_goes_on(run_once, untapped):
    """FORK-1."""
    argv = harness.python("forks.py")
    without = untapped.run(argv).expect(4)
    outcome = run_once(argv, "layers.*.mlp").expect(4)
    assert outcome.out == without.out
    found = captures.read(outcome.run)
    assert {(key.module, key.step, key.micro) for key in found} == {
        (f"layers.{i}.mlp", step, 0) for i in range(2) for step in range(2)
    }


@pytest.mark.parametrize("how", ["first", "reversed", "replaced"])
def test_the_jobs_own_importers_are_asked_as_ever(how, run_once, untapped_once):
    outcome = run_once(harness.python("importers.py", how), "layers.*.mlp").expect(0)
    assert outcome.out == untapped_once(harness.python("importers.py", "first")).out
    assert {key.step for key in captures.read(outcome.run)} >= {0, 1}


def test_libraries_that_dlopen_by_their_own_runpath_still_load(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "inner.c").write_text("int inner(void) { return 42; }\n")
    (tmp_path / "outer.c").write_text(
        '#include <dlfcn.h>\nint outer(void) {\n  void *h = dlopen("libinner.so", RTLD_NOW);\n'
        '  if (!h) return -1;\n  int (*f)(void) = (int (*)(void))dlsym(h, "inner");\n  return f ? f() : -2;\n}\n'
    )
    (tmp_path / "main.c").write_text(
        '#include <stdio.h>\nint outer(void);\nint main(void) { printf("%d\\n", outer()); return 0; }\n'
    )
    build = [
        "gcc -shared -fPIC -o deep/libinner.so inner.c",
        "gcc -shared -fPIC -o libouter.so outer.c -ldl -Wl,--enable-new-dtags,-rpath,$ORIGIN/deep",
        "gcc -o main main.c -L. -louter -Wl,-rpath,$ORIGIN",
    ]
    for line in build:
        subprocess.run(line.split(), cwd=tmp_path, check=True)
    for env in (harness.environment(), *_variants(tmp_path, {}).values()):
        assert harness.run([str(tmp_path / "main")], env).expect(0).out == "42\n"


def test_no_record_has_a_time_before_the_run(run_once):
    outcome = run_once(harness.python("forks.py"), "layers.*.mlp")
    run = flexmodel.open(outcome.run)
    assert all(record.time_ns >= run.info.started_ns for record in run.records)
