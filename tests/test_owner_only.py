"""Whatever is made for a run is its owner's alone, under any umask; the job keeps the umask that it had."""

import os
import subprocess

import flexmodel
import pytest

import harness

SCRIPT = """
umask
python {program} 2 > /dev/null
socket=${{FLEXMODEL_AGENT#unix:}}
find "$(dirname "$socket")" {out} -perm /077
find "$(dirname "$socket")" {out} > {seen}
"""


@pytest.mark.parametrize("umask", [0o000, 0o777])
def test_a_run_is_its_owners_alone_under_any_umask(umask, tmp_path):
    out, seen = tmp_path / "runs" / "x", tmp_path / "seen"
    seen.touch()
    script = SCRIPT.format(program=harness.PROGRAMS / "plain.py", out=out, seen=seen)
    argv = [harness.FLEXMODEL, "run", "--hooks", "layers.*.mlp", "--out", str(out), "--", "bash", "-c", script]
    with harness.Job(argv, preexec=lambda: os.umask(umask)) as job:
        outcome = job.wait().expect(0)
    assert outcome.out == f"{umask:04o}\n", outcome.text
    during = seen.read_text().splitlines()
    assert any(name.endswith(".sock") for name in during) and str(out / "run.json") in during
    found = subprocess.run(["find", out.parent, "-perm", "/077"], capture_output=True, text=True, check=True)
    assert found.stdout == "", found.stdout
    assert {path.stat().st_mode & 0o700 for path in out.iterdir()} == {0o600}
    assert len(flexmodel.open(out).records) == 2 * 2
