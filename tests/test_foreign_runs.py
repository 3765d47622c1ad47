"""A run that somebody else made is read within bounds, by every command and in Python: an error, or all that is sound.

Time and memory are limits of the system (RLIMIT_CPU, RLIMIT_AS): who exceeds them is killed, or gets no memory.
"""

import json
import os
import pathlib
import re
import resource
import select
import signal
import subprocess
import sys

import pytest

import harness
import hostile_runs
from hostile_runs import BAD_LINES, BOTH, CASES, ESCAPES, Run

CPU = 20  # seconds; what takes the longest takes a tenth
MEMORY = 2 << 30  # bytes of address space
PACKAGE = harness.ROOT / "python-shim"
OBEYED = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""What a terminal obeys; a line break is checked by the lines there are."""

READER = """
import json, sys, flexmodel
sound = (flexmodel.RunError, flexmodel.NotCapturedError, TypeError)
try:
    run = flexmodel.open(sys.argv[1])
    records = run.records
except flexmodel.RunError as error:
    print(json.dumps({"error": str(error)}))
    sys.exit(0)
said = [repr(run), *run.problems]
good = []
for record in records:
    said += [str(record), repr(record), str(record.shape), str(record.stats)[:9]]
    for take in (record.numpy, lambda: record.part(record.ranks[0]), lambda: run.get(record.module, kind=record.kind)):
        try:
            take()
            good.append(record.module)
        except sound as error:
            said.append(str(error))
modules = sorted({m for m in run})
assert modules == sorted({r.module for r in records})
print(json.dumps({"modules": modules, "said": said[:3000], "good": sorted(set(good)), "problems": run.problems}))
"""


def limited() -> None:
    """In the child: its bounds."""
    resource.setrlimit(resource.RLIMIT_CPU, (CPU, CPU))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def run_limited(argv: list[str], **env: str) -> subprocess.CompletedProcess:
    env = harness.environment(OPENBLAS_NUM_THREADS="1", PYTHONPATH=str(PACKAGE), **env)
    return subprocess.run(argv, env=env, capture_output=True, preexec_fn=limited, timeout=harness.TIMEOUT)


def command(*args: str) -> tuple[int, str, str]:
    """Runs a command of ours: an exit code of its own, and nothing in what it writes that a terminal would obey."""
    done = run_limited([harness.FLEXMODEL, *args])
    out, err = done.stdout.decode(), done.stderr.decode()
    assert done.returncode in (0, 1, 2), f"{args} ended with {done.returncode}\n{err[-3000:]}"
    assert "panicked" not in err and "memory allocation" not in err, err
    for text in (out, err):
        assert not OBEYED.search(text), f"{args} wrote {OBEYED.search(text)!r}"
    assert "gnp.exe\n" not in err.replace("note: ", "")
    return done.returncode, out, err


def in_python(root: pathlib.Path) -> dict:
    """What the Python reader makes of a run."""
    done = run_limited([sys.executable, "-c", READER, str(root)])
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    answer = json.loads(done.stdout)
    for text in [*answer.get("said", ()), answer.get("error", "")]:
        assert not OBEYED.search(text) and "\n" not in text, repr(text)
        assert len(text) < 10_000, f"a message of {len(text)} characters"
    return answer


@pytest.mark.parametrize("name", CASES)
def test_both_readers_serve_what_is_sound_and_name_what_is_not(name: str, tmp_path: pathlib.Path):
    run = Run(tmp_path / "run")
    left = CASES[name](run)
    run.write()
    root = str(run.root)
    code, out, err = command("ls", "--json", root)
    python = in_python(run.root)
    if left is None:
        assert code == 1 and err.count("\n") == 1 and "manifest.jsonl" in err, err
        assert "manifest.jsonl" in python["error"]
        return
    assert code == 0, err
    listing = json.loads(out)
    assert {row["module"] for row in listing["rows"]} == left
    assert set(python["modules"]) == left
    if left == BOTH and name not in HARMLESS:
        checked = json.loads(command("verify", "--json", root)[1])
        assert checked["problems"] or checked["notes"], "nothing is said of it"
        assert python["problems"] or name in TOLD_BY_VERIFY, "nothing is said of it in Python"
    command("ls", root)
    command("verify", root)
    if name.startswith("run_json"):
        return  # what is not in it changes nothing for the commands below
    has_bytes = not name.startswith("shard_00000_is")
    code, _, err = command("show", root, "before")
    assert code == (0 if has_bytes else 1), err
    assert ("before" in python["good"]) == has_bytes
    command("certify", root, root)
    if name not in TOO_LARGE_TO_WRITE:
        command("export", "--to", "npy", root, str(tmp_path / "npy"))
        command("export", "--to", "torch", root, str(tmp_path / "run.pt"))


def test_every_line_that_says_nothing_is_named_by_its_number_in_both(tmp_path: pathlib.Path):
    run = Run(tmp_path / "run")
    CASES["lines_that_say_nothing"](run)
    run.write()
    numbers = dict(enumerate(BAD_LINES, 2))  # behind the line of a sound record
    problems = json.loads(command("verify", "--json", str(run.root))[1])["problems"]
    in_rust = {int(p["place"].split()[-1]) for p in problems}
    said = [re.search(r"line (\d+) is skipped", problem) for problem in in_python(run.root)["problems"]]
    assert {numbers.get(n, n) for n in in_rust} == set(BAD_LINES)
    assert {numbers.get(int(m[1]), m[1]) for m in said if m} == set(BAD_LINES)


HARMLESS = {
    "sound", "a_run_of_links", "counts_that_overflow", "run_json_with_a_world_of_four_billion",
    "run_json_with_groups_that_multiply",
}  # fmt: skip
"""Nothing is wrong with these that a reader has to say."""
TOLD_BY_VERIFY = {"a_sealed_shard_with_a_lying_header"}
"""Headers of sealed shards are read by `verify` alone."""
TOO_LARGE_TO_WRITE = {"records_that_share_their_bytes"}
"""Records that are sound, each by itself, and large."""


CONTINUED = (
    "sound", "names_that_a_terminal_obeys", "a_sparse_manifest", "a_line_of_two_gigabytes", "one_part_again_and_again",
    "many_lines_with_a_wrong_checksum", "shards_by_the_thousand", "run_json_is_deep",
    "run_json_with_groups_that_multiply",
)  # fmt: skip


@pytest.mark.parametrize("name", CONTINUED)
def test_an_agent_continues_it_within_bounds(name: str, tmp_path: pathlib.Path):
    run = Run(tmp_path / "run")
    CASES[name](run)
    run.write()
    code, out, err = agent(run.root, tmp_path)
    assert code == 0, err
    assert not OBEYED.search(out + err), err
    assert {row["module"] for row in json.loads(command("ls", "--json", str(run.root))[1])["rows"]} >= BOTH
    assert run.file("manifest.jsonl").stat().st_size < 1 << 32


def agent(root: pathlib.Path, tmp_path: pathlib.Path) -> tuple[int, str, str]:
    """Starts an agent on a run, and ends it as soon as it has begun or refused."""
    argv = [harness.FLEXMODEL, "agent", "--socket", str(tmp_path / "s"), "--out", str(root)]
    with open(tmp_path / "err", "wb") as err:
        process = subprocess.Popen(
            argv, env=harness.environment(MALLOC_ARENA_MAX="2"), stdout=subprocess.PIPE, stderr=err, preexec_fn=limited
        )
        try:
            assert select.select([process.stdout], [], [], harness.TIMEOUT)[0], "it neither begins nor ends"
            first = os.read(process.stdout.fileno(), 1 << 16)
            process.send_signal(signal.SIGTERM)
            rest, _ = process.communicate(timeout=harness.TIMEOUT)
        finally:
            process.kill()
            process.wait()
    return process.returncode, (first + rest).decode(), (tmp_path / "err").read_text()


PLANTED = ("agent.lock", "manifest.jsonl", "run.json.new", "shard-00000.open")


@pytest.mark.parametrize("link", [os.symlink, os.link])
@pytest.mark.parametrize("name", PLANTED)
def test_an_agent_never_writes_through_a_link(name: str, link, tmp_path: pathlib.Path):
    run = Run(tmp_path / "run")
    run.info["finished_ns"] = None  # one that goes on: its run.json is written
    run.write()
    run.file(name).unlink(missing_ok=True)
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious\n" * 200_000)
    link(victim, run.file(name))
    code, _, err = agent(run.root, tmp_path)
    assert victim.read_bytes() == b"precious\n" * 200_000
    if name != "run.json.new":  # which is written while it runs
        assert code == 1
    assert name in err and "link" in err, err


def test_an_agent_makes_nothing_where_a_link_leads(tmp_path: pathlib.Path):
    run = Run(tmp_path / "run")
    run.write()
    run.file("agent.lock").symlink_to(tmp_path / "elsewhere")
    assert agent(run.root, tmp_path)[0] == 1
    assert not (tmp_path / "elsewhere").exists()


def test_an_export_writes_over_no_link_that_waits_for_it(tmp_path: pathlib.Path):
    run = Run(tmp_path / "run")
    run.write()
    victim, folder = tmp_path / "victim", tmp_path / "npy"
    victim.write_text("precious")
    assert command("export", "--to", "npy", str(run.root), str(folder))[0] == 0
    files = [file.name for file in folder.iterdir()]
    for name in files:
        (folder / name).unlink()
        (folder / name).symlink_to(victim)
        (folder / name).with_suffix(".partial").symlink_to(victim)
    assert command("export", "--force", "--to", "npy", str(run.root), str(folder))[0] == 0
    assert victim.read_text() == "precious"
    assert sorted(file.name for file in folder.iterdir() if not file.is_symlink()) == sorted(files)
    (tmp_path / "run.pt.partial").symlink_to(victim)
    assert command("export", "--to", "torch", str(run.root), str(tmp_path / "run.pt"))[0] == 0
    assert victim.read_text() == "precious"


def test_exported_files_lie_in_the_folder_and_are_as_many_as_the_records(tmp_path: pathlib.Path):
    run = Run(tmp_path / "run")
    names = hostile_runs.CASES["names_that_differ_in_nothing_that_a_file_system_takes"](run)
    for number in range(15_000 - len(names)):
        run.add(run.part("/../*", b"", step=0, call=number, path="?" * 300))
    run.write()
    code, _, err = command("export", "--to", "npy", str(run.root), str(tmp_path / "npy"))
    assert code == 0, err
    assert len(list((tmp_path / "npy").glob("*.npy"))) == 15_000
    assert sorted(file.name for file in tmp_path.iterdir()) == ["npy", "run"]


def test_paths_and_words_of_the_command_line_are_safe_to_print(tmp_path: pathlib.Path):
    for args in (["ls", f"{tmp_path}/{ESCAPES}"], ["show", str(tmp_path), ESCAPES], [ESCAPES], ["ls", "--" + ESCAPES]):
        code, _, err = command(*args)
        assert code in (1, 2) and err.count("\n") == 1, err
    root = tmp_path / ESCAPES
    run = Run(root)
    run.write()
    for args in (["ls"], ["verify"], ["show", "before"], ["certify", str(root)]):
        assert command(args[0], str(root), *args[1:])[0] == 0
    assert command("export", "--to", "npy", str(root), str(tmp_path / f"npy{ESCAPES}"))[0] == 0
    in_python(root)


def test_a_folder_of_runs_is_bounded_too(tmp_path: pathlib.Path):
    for number in range(2):
        run = Run(tmp_path / "job" / f"node-{number}{ESCAPES}")
        run.info |= {"world": (1 << 32) - 1, "node": ESCAPES, "hooks": ESCAPES * number}
        run.write()
    code, _, err = command("ls", str(tmp_path / "job"))
    assert code == 1 and err.count("\n") == 1
    assert "not the nodes of one job" in in_python(tmp_path / "job")["error"]
