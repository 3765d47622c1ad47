"""What is preloaded into every process: small, in need of nothing, and without a word where its engine does not fit."""

import pathlib
import re
import shutil
import subprocess

import pytest

import captures
import harness

ENGINE = harness.HOME / "libflexmodel_engine.so"
SPEAKS = "nothing.has.this.name"
"""Hooks of which a job that is tapped says that they match nothing."""


def _readelf(*options: str, of: pathlib.Path) -> str:
    return subprocess.run(["readelf", "-W", *options, of], check=True, capture_output=True, text=True).stdout


def _needed(library: pathlib.Path) -> set[str]:
    return set(re.findall(r"\(NEEDED\).*\[(.+)\]", _readelf("-d", of=library)))


@pytest.mark.parametrize(
    ("library", "source"),
    [(harness.LIBRARY, "interposer/preload/src/lib.rs"), (ENGINE, "interposer/src/lib.rs")],
    ids=["preload", "engine"],
)
def test_every_exported_symbol_is_on_the_list(library, source):
    section = (harness.ROOT / source).read_text().split("# Exported symbols")[1].split("//! #")[0]
    listed = set(re.findall(r"^//! - `(\w+)`", section, re.M))
    out = subprocess.run(["nm", "-D", "--defined-only", library], check=True, capture_output=True, text=True)
    assert {line.split()[-1].split("@")[0] for line in out.stdout.splitlines()} == listed


def test_the_preload_needs_the_c_library_alone_and_no_newer_one_than_the_first():
    assert _needed(harness.LIBRARY) == {"libc.so.6"}
    wanted = _readelf("--dyn-syms", of=harness.LIBRARY)
    assert set(re.findall(r"@(\S+)", wanted)) == {"GLIBC_2.2.5"}
    names = set(re.findall(r"UND (\w+)", wanted))
    assert "getenv" in names and "abort" not in names, "there is code that can panic"
    # Where a process has no dlsym, as one without libdl before glibc 2.34, that is no reason not to start.
    assert re.search(r"WEAK\s+DEFAULT\s+UND dlsym@", wanted), wanted


def test_the_preload_is_small():
    """What a process pays for it: pages that are mapped and touched, and relocations."""
    assert harness.LIBRARY.stat().st_size < 32 << 10
    relocations = re.findall(r"^[0-9a-f]{16} ", _readelf("-r", of=harness.LIBRARY), re.M)
    assert len(relocations) < 40


def test_the_engine_needs_the_c_library_and_gccs():
    assert _needed(ENGINE) <= {"libc.so.6", "libgcc_s.so.1", "ld-linux-x86-64.so.2"}


def test_a_program_of_musl_starts_and_ends_as_without(tmp_path):
    if not shutil.which("musl-gcc"):
        pytest.skip("there is no musl-gcc: scripts/setup --test says how to get it")
    (tmp_path / "m.c").write_text(
        "#include <dlfcn.h>\n#include <stdio.h>\n"
        'int main(void) { printf("%d\\n", dlopen("libnone.so", RTLD_NOW) != 0); return 7; }\n'
    )
    subprocess.run(["musl-gcc", "-o", tmp_path / "m", tmp_path / "m.c"], check=True)
    without = harness.run([str(tmp_path / "m")]).expect(7)
    for env in (
        harness.environment(LD_PRELOAD=str(harness.LIBRARY)),
        harness.preloaded("**:forward", tmp_path / "absent"),
    ):
        within = harness.run([str(tmp_path / "m")], env)
        assert (within.code, within.out, within.err) == (without.code, without.out, without.err)


@pytest.fixture
def sanitized(tmp_path) -> pathlib.Path:
    """A program that is linked with AddressSanitizer's shared runtime."""
    (tmp_path / "a.cc").write_text(
        "#include <cstdio>\n#include <vector>\n"
        'int main(int argc, char **) { std::vector<int> v(argc, 5); std::printf("%d\\n", v[0]); return 5; }\n'
    )
    subprocess.run(["g++", "-fsanitize=address", "-o", tmp_path / "a", tmp_path / "a.cc"], check=True)
    return tmp_path / "a"


def _libasan() -> str:
    out = subprocess.run(["g++", "-print-file-name=libasan.so"], check=True, capture_output=True, text=True).stdout
    return str(pathlib.Path(out.strip()).resolve())


@pytest.mark.parametrize("preloads", [False, True], ids=["linked", "preloaded"])
def test_a_sanitized_program_starts_under_flexmodel_run(preloads, sanitized, tmp_path):
    env = {"LD_PRELOAD": _libasan()} if preloads else {}
    outcome = harness.tapped([str(sanitized)], "a", tmp_path / "x", **env).expect(5)
    assert outcome.out == "5\n" and "AddressSanitizer" not in outcome.err, outcome.text


def test_what_the_user_preloads_comes_first(tmp_path):
    show = ["bash", "-c", 'echo "$LD_PRELOAD|$ASAN_OPTIONS"']
    outcome = harness.tapped(show, "a", tmp_path / "x", LD_PRELOAD="/usr/lib/libnone.so", ASAN_OPTIONS="a=1").expect(0)
    assert outcome.out == f"/usr/lib/libnone.so:{harness.LIBRARY}|a=1\n"
    outcome = harness.tapped(show, "a", tmp_path / "y", ASAN_OPTIONS="a=1").expect(0)
    assert outcome.out == f"{harness.LIBRARY}|a=1:verify_asan_link_order=0\n"


def test_a_job_with_a_sanitizers_preload_is_tapped(tmp_path):
    env = {"LD_PRELOAD": _libasan(), "ASAN_OPTIONS": "detect_leaks=0", "FLEXMODEL_SLAB": "1M"}
    outcome = harness.tapped(harness.python("plain.py"), "lm_head:forward", tmp_path / "x", **env).expect(0)
    assert {key.step for key in captures.read(outcome.run)} == {0, 1, 2}, outcome.text


def _home(folder: pathlib.Path, engine: str | None) -> pathlib.Path:
    """An install whose engine is missing, or made of this C code."""
    folder.mkdir()
    shutil.copy(harness.LIBRARY, folder)
    if engine is not None:
        (folder / "e.c").write_text(engine)
        subprocess.run(["gcc", "-shared", "-fPIC", "-o", folder / ENGINE.name, folder / "e.c"], check=True)
    return folder / harness.LIBRARY.name


@pytest.mark.parametrize(
    ("engine", "why"),
    [
        (None, f"{ENGINE.name}: cannot open shared object file: No such file or directory; run scripts/setup"),
        ("int nothing;", f"{ENGINE.name} is of another version than libflexmodel.so; run scripts/setup"),
        (
            "_Bool flexmodel_engine_start(const void *p) { return 0; }",
            f"{ENGINE.name} is of another version than libflexmodel.so; run scripts/setup",
        ),
    ],
    ids=["missing", "without-the-symbol", "refusing"],
)
def test_an_engine_that_does_not_fit_is_one_line_and_the_job_is_untapped(engine, why, tmp_path, untapped_once):
    env = harness.preloaded(SPEAKS, tmp_path / "absent") | {"LD_PRELOAD": str(_home(tmp_path / "home", engine))}
    outcome = harness.run(harness.python("plain.py"), env).expect(0)
    assert outcome.losses == untapped_once(harness.python("plain.py")).losses
    ours = [line for line in outcome.err.splitlines() if line.startswith("flexmodel:")]
    assert len(ours) == 1 and ours[0].endswith(why), outcome.text


def test_a_link_to_the_preload_finds_the_engine_beside_the_file(tmp_path):
    (tmp_path / "fm.so").symlink_to(harness.LIBRARY)
    env = harness.preloaded(SPEAKS, tmp_path / "absent") | {"LD_PRELOAD": str(tmp_path / "fm.so")}
    outcome = harness.run(harness.python("plain.py"), env).expect(0)
    assert f"'{SPEAKS}' matches no module" in outcome.err, outcome.text


def test_stderr_that_became_a_file_of_the_jobs_stays_its_own(tmp_path):
    """The line about a missing engine goes to the stderr that the process began with, or nowhere."""
    program = f"""
import os
os.close(2)
assert os.open({str(tmp_path / "own")!r}, os.O_RDWR | os.O_CREAT) == 2
import plain  # torch comes when descriptor 2 is another file
plain.main()
"""
    env = harness.preloaded(SPEAKS, tmp_path / "absent", PYTHONPATH=str(harness.PROGRAMS))
    env["LD_PRELOAD"] = str(_home(tmp_path / "home", None))
    harness.run(["python", "-c", program], env).expect(0)
    assert (tmp_path / "own").read_text() == ""


@pytest.mark.parametrize(("who", "speaks"), [("parent", True), ("child", False)])
def test_a_child_that_was_forked_before_torch_came_is_untapped(who, speaks, tmp_path):
    """FORK-1."""
    env = harness.preloaded(SPEAKS, tmp_path / "absent")
    outcome = harness.run(harness.python("late_torch.py", who), env).expect(0)
    assert len(outcome.losses) == 1
    assert ("flexmodel:" in outcome.err) == speaks, outcome.text
