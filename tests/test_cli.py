"""Bad input ends in one clear line with the place, the reason and the way out, before the job starts."""

import json
import pathlib
import shutil
import socket

import flexmodel
import pytest
import torch

import captures
import harness

BAD_HOOKS = {
    "unknown kind": ("layers.*.mlp:forwad", ["forwad", "forward"]),
    "unknown option": ("layers.*.mlp@evry=2", ["evry", "every"]),
    "bad option value": ("layers.*.mlp@every=none", ["every", "none"]),
    "unknown dtype": ("lm_head@dtype=float31", ["float31", "float32"]),
    "unknown edit": ("lm_head|scael(2)", ["scael", "scale"]),
    "bad regular expression": ("/layers[/", ["layers["]),
    "empty selector": (":forward", ["forward"]),
    "second clause": ("lm_head;layers.*.mlp:backwards", ["backwards", "backward"]),
    "not available yet": ("layers.0.mlp|edits.py:double", ["edits.py", "not available"]),
    "no such file": ("hooks/none.toml", ["hooks/none.toml"]),
}


def _refused(outcome: harness.Outcome, *words: str) -> None:
    """A line on stderr with these words, and the command never ran."""
    assert outcome.code not in (0, 101), outcome.text
    lines = outcome.err.strip().splitlines()
    assert len(lines) == 1, outcome.text
    for word in words:
        assert word in lines[0], outcome.text
    assert outcome.out == ""


@pytest.mark.parametrize("name", BAD_HOOKS)
def test_bad_hooks_are_refused(name, tmp_path):
    hooks, words = BAD_HOOKS[name]
    outcome = harness.tapped(["echo", "ran"], hooks, tmp_path / "x")
    _refused(outcome, *words)
    assert not (tmp_path / "x").exists()


def test_bad_hooks_are_called_what_the_user_wrote(tmp_path):
    given, inherited = "lm_head:forwad", "lm_head;lm_head@evry=2"
    run = [harness.FLEXMODEL, "run", "--out", str(tmp_path / "x")]
    env = harness.environment(FLEXMODEL_HOOKS=inherited)
    _refused(harness.run([*run, "--hooks", given, "--", "echo", "ran"], env), "flexmodel: --hooks clause 1, column 9")
    _refused(harness.run([*run, "--", "echo", "ran"], env), "FLEXMODEL_HOOKS clause 2, column 17")


def test_the_model_itself_is_selected_by_the_name_it_is_shown_with(run_once):
    outcome = run_once(harness.python("plain.py"), "(root):forward;(root):forward_pre").expect(0)
    run = captures.expect_sound(outcome.run)
    assert {(r.module, r.kind) for r in run.records} == {("", "forward"), ("", "forward_pre")}
    assert "matches no module" not in outcome.err


def test_a_hook_for_ranks_that_the_job_lacks_is_told_once(run_once, untapped_once):
    outcome = run_once(harness.python("plain.py"), "lm_head@ranks=1..3;lm_head:forward_pre@ranks=0+1").expect(0)
    assert outcome.out == untapped_once(harness.python("plain.py")).out
    told = [line for line in outcome.err.splitlines() if "selects no rank" in line]
    assert len(told) == 1
    assert "'lm_head@ranks=1..3' selects no rank of this job, which has 1 rank" in told[0]


def test_a_bad_toml_file_is_refused_with_its_line(tmp_path):
    hooks = tmp_path / "hooks.toml"
    hooks.write_text('[[hook]]\nselect = "lm_head"\nkinds = ["forwad"]\n')
    _refused(harness.tapped(["echo", "ran"], str(hooks), tmp_path / "x"), "hooks.toml", "3", "forwad", "forward")
    hooks.write_text('[[hook]\nselect = "lm_head"\n')
    _refused(harness.tapped(["echo", "ran"], str(hooks), tmp_path / "x"), "hooks.toml", "1")


def test_no_hooks_at_all_is_refused_with_an_example(tmp_path):
    argv = [harness.FLEXMODEL, "run", "--out", str(tmp_path / "x"), "--", "echo", "ran"]
    _refused(harness.run(argv), "--hooks", "FLEXMODEL_HOOKS")


def test_a_folder_in_use_is_refused_with_the_way_out(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("precious")
    _refused(harness.tapped(["echo", "ran"], "lm_head", tmp_path / "full"), str(tmp_path / "full"), "empty", "--out")
    assert (tmp_path / "full" / "mine.txt").read_text() == "precious"
    _refused(harness.tapped(["echo", "ran"], "lm_head", tmp_path / "full" / "mine.txt"), "mine.txt")
    _refused(harness.tapped(["echo", "ran"], "lm_head", pathlib.Path("/proc/none/x")), "/proc/none")


def test_a_port_in_use_is_refused(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        _refused(harness.tapped(["echo", "ran"], "lm_head", tmp_path / "x", "--port", port), port, "--port")


def test_a_python_without_torch_still_runs(tmp_path):
    outcome = harness.tapped(["/usr/bin/env", "-i", "/bin/sh", "-c", "echo ran"], "lm_head", tmp_path / "x")
    outcome.expect(0)
    assert outcome.out == "ran\n"


@pytest.mark.parametrize("command", ["ls", "show", "verify", "export"])
def test_what_is_no_run_is_refused(command, tmp_path):
    rest = {"show": ["lm_head"], "export": ["--to", "npy", str(tmp_path / "dest")]}.get(command, [])
    for path in (tmp_path, tmp_path / "none"):
        _refused(harness.run([harness.FLEXMODEL, command, str(path), *rest]), str(path))


@pytest.fixture
def finished(run_once, tmp_path) -> pathlib.Path:
    """A copy of a finished run, to be damaged."""
    outcome = run_once(harness.python("plain.py"), "layers.*.mlp:forward,backward;lm_head").expect(0)
    return pathlib.Path(shutil.copytree(outcome.run, tmp_path / "run"))


def test_ls_and_show_say_what_is_there(finished):
    listing = harness.run([harness.FLEXMODEL, "ls", str(finished)]).expect(0).out
    assert "layers.0.mlp" in listing and "lm_head" in listing and "backward" in listing
    rows = json.loads(harness.run([harness.FLEXMODEL, "ls", str(finished), "--json"]).expect(0).out)["rows"]
    assert {row["module"] for row in rows} == {"layers.0.mlp", "layers.1.mlp", "lm_head"}
    show = [harness.FLEXMODEL, "show", str(finished), "lm_head", "--step", "2"]
    assert "lm_head" in harness.run(show).expect(0).out
    shown = json.loads(harness.run([*show, "--json"]).expect(0).out)
    value = flexmodel.open(finished).get("lm_head", step=2).double()
    assert json.dumps(shown).count("mean") and shown["stats"]["mean"] == pytest.approx(value.mean().item())


def test_show_of_a_module_that_is_not_there_names_the_nearest(finished):
    _refused(harness.run([harness.FLEXMODEL, "show", str(finished), "lm_haed"]), "lm_haed", "lm_head")


def test_exports_hold_the_same_bytes(finished, tmp_path):
    import numpy

    run = flexmodel.open(finished)
    harness.run([harness.FLEXMODEL, "export", str(finished), "--to", "npy", str(tmp_path / "npy")]).expect(0)
    arrays = [numpy.load(f) for f in (tmp_path / "npy").rglob("*.npy")]
    assert sorted(a.tobytes() for a in arrays) == sorted(r.numpy().tobytes() for r in run.records)
    harness.run([harness.FLEXMODEL, "export", str(finished), "--to", "torch", str(tmp_path / "run.pt")]).expect(0)
    tensors = torch.load(tmp_path / "run.pt", weights_only=True)
    assert sorted(t.numpy().tobytes() for t in tensors.values()) == sorted(r.numpy().tobytes() for r in run.records)


def test_a_sealed_shard_opens_in_any_safetensors_reader(finished):
    from safetensors.torch import load_file

    (shard,) = finished.glob("*.safetensors")
    inside = [t for name, t in load_file(shard).items() if not name.startswith("__")]
    assert len(inside) == len(flexmodel.open(finished).records)


def test_a_damaged_shard_is_named_and_the_rest_is_served(finished):
    run = flexmodel.open(finished)
    victim, other = run["layers.0.mlp"][0], run["lm_head"][0]
    whole = other.tensor().clone()
    at = victim.parts[0].at
    (shard,) = finished.glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[at.offset] ^= 0xFF
    shard.write_bytes(data)
    outcome = harness.run([harness.FLEXMODEL, "verify", str(finished)]).expect(1)
    assert "layers.0.mlp" in outcome.out + outcome.err and shard.name in outcome.out + outcome.err
    assert captures.same_bytes(flexmodel.open(finished).get("lm_head", step=other.step), whole)


def test_a_truncated_run_is_said_and_the_rest_is_served(finished):
    (shard,) = finished.glob("*.safetensors")
    run = flexmodel.open(finished)
    last = max(p.at.offset for r in run.records for p in r.parts if p.at)
    with open(shard, "r+b") as file:
        file.truncate(last)
    harness.run([harness.FLEXMODEL, "verify", str(finished)]).expect(1)
    first = flexmodel.open(finished)["layers.0.mlp"][0]
    assert first.tensor().shape == first.shape


def test_a_run_with_the_index_that_older_versions_made_reads_and_stays_as_it_is(finished):
    def files() -> dict:
        return {path.name: path.read_bytes() for path in finished.iterdir()}

    assert not [name for name in files() if "sqlite" in name]
    (finished / "index.sqlite").write_bytes(b"SQLite format 3\0 of a manifest that is longer by now")
    before = files()
    for command in ("ls", "verify"):
        harness.run([harness.FLEXMODEL, command, str(finished)]).expect(0)
    assert len(flexmodel.open(finished).records) == 2 * 2 * 3 + 3
    assert files() == before


def test_doctor_speaks_of_torch_and_the_bridge():
    outcome = harness.run([harness.FLEXMODEL, "doctor"])
    assert outcome.code in (0, 1)
    assert "torch" in outcome.out and "bridge" in outcome.out
