"""Writes run directories as `agent/run/src/format.rs` says, in as little Python as that takes."""

from __future__ import annotations

import json
from pathlib import Path

import google_crc32c
import numpy as np
import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "python-shim"
HEADER_SPACE = 1 << 20


def shard(dim: int) -> dict:
    return {"shard": {"dim": dim}}


def axis(index: int, size: int, place: object = "replicate", name: str = "dp") -> dict:
    return {"name": name, "index": index, "size": size, "place": place}


class Writer:
    """A run directory with one shard."""

    def __init__(self, root: Path, **info: object) -> None:
        self.root = root
        self.stem = "shard-00000"
        root.mkdir(parents=True)
        self.info(**info)
        (root / "manifest.jsonl").touch()
        self.shard = root / f"{self.stem}.open"
        self.shard.write_bytes(bytes(HEADER_SPACE))

    def info(self, **changed: object) -> None:
        info = {"format": 1, "flexmodel": "0.1.0", "command": ["python", "train.py"], "finished_ns": None, **changed}
        (self.root / "run.json").write_text(json.dumps(info))

    def part(
        self, module: str, data: np.ndarray | bytes, *, dtype: str | None = None, shape: tuple[int, ...] | None = None,
        rank: int = 0, axes: list[dict] | None = None, align: int = 64, stats: dict | None = None, store: bool = True,
        loss_scale: object = 1.0, revision: int = 0, **identity: object,
    ) -> dict:  # fmt: skip
        """Appends a part; `align=1` lays it beside the one before."""
        if isinstance(data, np.ndarray):
            dtype, shape = dtype or data.dtype.name, data.shape if shape is None else shape
            data = data.tobytes()
        at = None
        if store:
            with self.shard.open("ab") as file:
                file.write(bytes(-file.tell() % align))
                at = {"shard": self.stem, "offset": file.tell(), "len": len(data), "crc": google_crc32c.value(data)}
                file.write(data)
        what = self.what(module, dtype, shape, rank, axes or [], **identity)
        under = {"revision": revision} if revision else {}
        self.line({"t": "part", **what, "loss_scale": loss_scale, **under, "at": at, "stats": stats})
        return what

    @staticmethod
    def what(module, dtype, shape, rank, axes, **identity) -> dict:
        own = {
            "kind": "forward", "path": "out", "model": 0, "step": 0, "micro": 0, "call": 0, "repeat": 0,
            "train": True,
        }  # fmt: skip
        assert identity.keys() <= own.keys() | {"job", "attempt"}
        return {
            "module": module, **own, **identity, "class": "MLP", "group": "", "dtype": dtype,
            "shape": list(shape or ()),
            "rank": rank, "axes": axes, "dp_size": max([a["size"] for a in axes if a["name"] == "dp"], default=1),
            "time_ns": 1_700_000_000_000_000_000 + rank,
        }  # fmt: skip

    def line(self, record: dict) -> None:
        inner = json.dumps(record, separators=(",", ":"), ensure_ascii=False).encode()
        with (self.root / "manifest.jsonl").open("ab") as file:
            file.write(b'{"crc":"%08x","rec":%b}\n' % (google_crc32c.value(inner), inner))

    def seal(self) -> None:
        self.shard.rename(self.root / f"{self.stem}.safetensors")
        self.line({"t": "sealed", "shard": self.stem, "len": self.sealed().stat().st_size})

    def sealed(self) -> Path:
        return self.root / f"{self.stem}.safetensors"


def raises(text: str, error: type[Exception] = KeyError):
    """The error, with `text` in its message as people see it."""
    return pytest.raises(error, match=text)
