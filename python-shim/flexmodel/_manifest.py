"""The manifest: JSON lines that carry their own checksum, appended while the job runs.

Nothing is written here. A line without its end is one that is being written (or that a dead agent left); it is read
once it is whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import json
import math
import operator
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ._crc import crc32c_of_ranges
from ._dtypes import SIZES
from ._errors import RunError
from ._types import KINDS, Axis, Divergence, Dropped, Identity, Location, Part, Refusal, Stats

_HEAD = len('{"crc":"1a2b3c4d","rec":')
_LONGEST = 1 << 20  # bytes; no line of ours comes near
_CHUNK = 16 << 20
_LF = 10
_NOT_FINITE = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan, None: math.nan}
_STATS = operator.itemgetter(*(field.name for field in dataclasses.fields(Stats)))


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """For making a great many objects, none of them garbage: looking for cycles among them would double the time."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


class Manifest:
    """What the lines read so far say."""

    def __init__(self, path: Path, folder: str = "") -> None:
        self._path = path
        self._folder = folder  # of the shards, as far as their names tell it: `node-a/`
        self._start_over()

    @property
    def each(self) -> list[Manifest]:
        """The files that are read: this one."""
        return [self]

    @property
    def path(self) -> Path:
        """The file."""
        return self._path

    def _start_over(self) -> None:
        self._inode: int | None = None
        self._offset = 0
        self._line = 0
        self.parts: dict[Identity, list[Part]] = {}
        self.refused: list[Refusal] = []
        self.divergences: list[Divergence] = []
        self.dropped: list[Dropped] = []
        self.problems: list[str] = []
        self.shard_ends: dict[str, int] = {}  # bytes that each shard must have
        self.part_count = 0
        self.ranks: set[int] = set()
        self.tail = 0  # bytes after the last whole line

    def refresh(self) -> None:
        """Reads the lines that are new. Starts over if the file is another one, or was cut.

        A record whose parts became more gets a new list in `parts`; lists are never changed in place.
        """
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            self._start_over()
            return
        except OSError as error:
            raise RunError(f"{self._path} cannot be opened: {error.strerror}") from error
        with file:
            stat = os.fstat(file.fileno())
            if self._inode != stat.st_ino or stat.st_size < self._offset:
                self._start_over()
                self._inode = stat.st_ino
            with uncollected():
                self._read(file, stat.st_size)

    def _read(self, file: Any, size: int) -> None:
        while self._offset < size:
            file.seek(self._offset)
            data = file.read(min(_CHUNK, size - self._offset))
            end = data.rfind(b"\n") + 1
            if not end:
                if len(data) < _CHUNK:
                    break
                # Over the limit by far: look for its end further on.
                file.seek(self._offset)
                data = file.read(size - self._offset)
                end = data.find(b"\n") + 1
                if not end:
                    break
            self._take(data[:end])
            self._offset += end
        self.tail = size - self._offset

    def _take(self, data: bytes) -> None:
        """Reads whole lines."""
        array = np.frombuffer(data, np.uint8)
        stops = np.flatnonzero(array == _LF)
        starts = np.concatenate(([0], stops[:-1] + 1))
        inner, ends = starts + _HEAD, stops - 1
        fit = (ends > inner) & (ends - inner < _LONGEST)
        sums = iter(crc32c_of_ranges(array, inner[fit], ends[fit]).tolist())
        add_part, decode = self._add_part, json.JSONDecoder().raw_decode
        for start, stop, fits in zip(starts.tolist(), stops.tolist(), fit.tolist(), strict=True):
            self._line += 1
            crc = next(sums) if fits else None
            try:
                if crc is None or data[start : start + _HEAD] != b'{"crc":"%08x","rec":' % crc:
                    raise ValueError("its checksum is wrong")
                raw, _ = decode(data[start + _HEAD : stop - 1].decode())
                if raw["t"] == "part":
                    add_part(raw)
                else:
                    self._add_other(raw)
            except Exception as error:  # whatever is wrong with a line, the others are served
                reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
                self.problems.append(f"{self._path}: line {self._line} is skipped: {reason}")

    def _add_part(self, raw: dict[str, Any]) -> None:
        at, stats = raw["at"], raw["stats"]
        if raw["dtype"] not in SIZES:
            raise ValueError(f"its dtype {raw['dtype']!r} is unknown; install a newer flexmodel")
        shape = tuple(raw["shape"])
        if at is not None:
            shard, offset, nbytes = self._folder + at["shard"], at["offset"], at["len"]
            at = Location(shard, offset, nbytes, at["crc"])
            if offset + nbytes > self.shard_ends.get(shard, 0):
                self.shard_ends[shard] = offset + nbytes
        axes = tuple([_axis(a, _ndim(shape, raw["axes"])) for a in raw["axes"]])
        part = Part(
            raw["rank"], raw["dtype"], shape, axes, at,
            raw["class"], raw["group"], raw["dp_size"], _loss_scale(raw.get("loss_scale", 1.0)), raw["time_ns"],
            None if stats is None else _STATS(stats), raw.get("same"),
        )  # fmt: skip
        identity = _identity(raw)
        before = self.parts.get(identity)
        if before is None:
            self.parts[identity] = [part]
        else:
            # An agent that died between journal and acknowledgement may write a rank's part again.
            self.parts[identity] = [p for p in before if p.seat != part.seat] + [part]
        self.part_count += 1
        self.ranks.add(part.rank)

    def _add_other(self, raw: dict[str, Any]) -> None:
        kind = raw["t"]
        if kind == "refused":
            self.refused.append(Refusal(_identity(raw), raw["rank"], raw["reason"]))
        elif kind == "divergence":
            self.divergences.append(Divergence(_identity(raw), raw["rank"], raw["against"]))
        elif kind == "dropped":
            self.dropped.append(Dropped(raw["rank"], raw["count"], raw["reason"]))
        elif kind == "sealed":
            shard = self._folder + raw["shard"]
            self.shard_ends[shard] = max(raw["len"], self.shard_ends.get(shard, 0))
        else:
            raise ValueError(f"it is a {kind!r}, which this flexmodel does not know; install a newer one")

    def check_shards(self, problem: Callable[[str, int], str | None]) -> list[str]:
        """What `problem` says of each shard that the manifest names."""
        found = (problem(stem, end) for stem, end in sorted(self.shard_ends.items()))
        return [text for text in found if text]


def _loss_scale(raw: Any) -> float:
    """JSON has no number for a scale that is infinite or none; null is what older versions wrote for them."""
    if type(raw) in (int, float):
        return float(raw)
    if not (raw is None or isinstance(raw, str)) or raw not in _NOT_FINITE:
        raise ValueError(f"its loss scale {raw!r} is no number")
    return _NOT_FINITE[raw]


def _identity(raw: dict[str, Any]) -> Identity:
    if raw["kind"] not in KINDS:
        raise ValueError(f"its kind {raw['kind']!r} is unknown; install a newer flexmodel")
    return Identity(
        raw["module"], raw["kind"], raw["path"], raw["model"], raw["step"], raw["micro"], raw["call"],
        raw["repeat"], raw["train"], raw["recompute"],
    )  # fmt: skip


def _ndim(shape: tuple[int, ...], axes: list[dict[str, Any]]) -> int:
    """Dimensions of the tensor that a part is a piece of."""
    flat = [a["place"]["flat"]["shape"] for a in axes if isinstance(a["place"], dict) and "flat" in a["place"]]
    return len(flat[0] if flat else shape)


def _axis(raw: dict[str, Any], ndim: int) -> Axis:
    place, dim, offset, shape = raw["place"], -1, None, None
    if not isinstance(place, str):
        ((place, how),) = place.items()
        if place == "flat":
            shape = tuple(how["shape"])
        else:
            dim, offset = how["dim"], how.get("offset")
            if not 0 <= dim < ndim:
                raise ValueError(f"it shards dimension {dim} of a tensor that has {ndim}")
    return _known_axis(raw["name"], raw["index"], raw["size"], place, dim, offset, shape, raw.get("given"))


@functools.lru_cache(4096)
def _known_axis(
    name: str,
    index: int,
    size: int,
    place: str,
    dim: int,
    offset: int | None,
    shape: tuple[int, ...] | None,
    given: int | None,
) -> Axis:
    """Axes are few and parts are many: one object for all that are equal."""
    if not 0 <= index < size:
        raise ValueError(f"it says {name} {index} of {size}")
    return Axis(name, index, size, place, dim, offset, shape, given)
