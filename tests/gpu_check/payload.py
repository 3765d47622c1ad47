"""Packs what a machine without Rust, compiler and network needs into one file: FlexModel, a bridge, and the stages."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
import tarfile

from harness import ROOT

LARGEST = 64 << 20
"""Bytes that a payload may have."""

TESTS = ("gpu_check", "programs", "captures.py", "harness.py", "launcher.py", "reference.py")
SKIPPED = ("__pycache__", ".pyc")


def pack(prefix: pathlib.Path, target: pathlib.Path) -> int:
    """Writes `target`. The bridge in it is for the torch of the Python that runs this."""
    built = ROOT / "target" / "release"
    cargo = ["cargo", "build", "--quiet", "--release", "--locked", "--manifest-path", str(ROOT / "Cargo.toml")]
    for what in (["-p", "nccl-standin"], ["-p", "nccl-sys", "--example", "probe"]):
        subprocess.run([*cargo, *what], check=True)
    bridge = _bridge(prefix)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(target, "w:gz", compresslevel=6) as archive:

        def add(path: pathlib.Path, name: str) -> None:
            archive.add(path.resolve(), name, filter=_plain)

        add(prefix / "bin" / "flexmodel", "bin/flexmodel")
        add(built / "examples" / "probe", "bin/nccl-probe")
        add(built / "libnccl.so", "lib/libnccl-standin.so")
        add(prefix / "lib" / "flexmodel", "lib/flexmodel")
        add(bridge, f"bridges/{bridge.parent.name}/{bridge.name}")
        add(ROOT / "scripts" / "gpu-check", "scripts/gpu-check")
        add(ROOT / "python-shim" / "flexmodel", "python-shim/flexmodel")
        for name in TESTS:
            add(ROOT / "tests" / name, f"tests/{name}")
    size = target.stat().st_size
    print(f"gpu-check: {target} has {size / 1e6:.1f} MB, with the bridge {bridge.parent.name}")
    if size > LARGEST:
        print(f"gpu-check: that is more than {LARGEST >> 20} MiB", file=sys.stderr)
        return 1
    print("gpu-check: there: mkdir gpu-check && tar -xzf FILE -C gpu-check && gpu-check/scripts/gpu-check [STAGE]...")
    return 0


def _bridge(prefix: pathlib.Path) -> pathlib.Path:
    """Of this Python, built unless it is in the cache."""
    command = [str(prefix / "bin" / "flexmodel"), "bridge", "build", "--json", "--python", sys.executable]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return pathlib.Path(json.loads(done.stdout)["path"])


def _plain(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """As it is to lie there: whoever unpacks it has it, and nobody else may write it, or no job would load it."""
    if member.name.endswith(SKIPPED):
        return None
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
    return member
