"""The manifest: JSON lines that carry their own checksum, appended while the job runs.

Nothing is written here. A line without its end is one that is being written (or that a dead agent left); it is read
once it is whole. The agent's `index.sqlite` is not used: it holds parts alone, so refusals, divergences and damage take
the manifest anyway, and for a hundred thousand parts its rows are read only a few tenths of a second faster than these.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _lines
from ._crc import crc32c_of_ranges
from ._errors import RunError
from ._files import line_end, open_to_read
from ._limits import LINE, PROBLEMS
from ._text import clip, safe
from ._types import Divergence, Dropped, Identity, Part, Refusal

_HEAD = len('{"crc":"1a2b3c4d","rec":')
_CHUNK = 4 << 20
_LF, _CLOSING, _ZERO = b"\n}0"
_FRAME = np.frombuffer(b'{"crc":"00000000","rec":', np.uint8)
_DIGITS = [at for at, byte in enumerate(_FRAME) if byte == _ZERO]
_NIBBLES = np.zeros(256, np.uint32)
_NIBBLES[np.frombuffer(b"0123456789abcdef", np.uint8)] = range(16)
_IS_DIGIT = np.isin(np.arange(256), np.frombuffer(b"0123456789abcdef", np.uint8))


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
        self._grown: dict[Identity, list[Part]] = {}  # records that have several parts, some of them new
        self._named: list[str] = []
        self._unnamed = 0
        self.parts: dict[Identity, list[Part]] = {}
        self.refused: list[Refusal] = []
        self.divergences: list[Divergence] = []
        self.dropped: list[Dropped] = []
        self.shard_ends: dict[str, int] = {}  # bytes that each shard must have
        self.part_count = 0
        self.ranks: set[int] = set()
        self.tail = 0  # bytes after the last whole line

    @property
    def problems(self) -> list[str]:
        """Lines that were skipped, and why: the first by number, how many more."""
        more = f"{self._path}: and {self._unnamed} more lines are skipped; `flexmodel verify` says what is left"
        return [*self._named, more] if self._unnamed else self._named

    def refresh(self) -> None:
        """Reads the lines that are new. Starts over if the file is another one, or was cut."""
        try:
            file = open_to_read(self._path)
        except FileNotFoundError:
            self._start_over()
            return
        except OSError as error:
            raise RunError(f"{self._path} cannot be opened: {error.strerror}") from error
        try:
            stat = os.fstat(file)
            if self._inode != stat.st_ino or stat.st_size < self._offset:
                self._start_over()
                self._inode = stat.st_ino
            with uncollected():
                self._read(file, stat.st_size)
        except MemoryError:
            raise RunError(f"{self._path} does not fit into the memory that there is") from None
        except OSError as error:
            raise RunError(f"{self._path} cannot be read: {error.strerror}") from error
        finally:
            os.close(file)

    def _read(self, file: int, size: int) -> None:
        while self._offset < size:
            data = os.pread(file, min(_CHUNK, size - self._offset), self._offset)
            end = data.rfind(b"\n") + 1
            if end:
                self._take(data[:end])
                self._offset += end
                continue
            # Over the limit by far, or half a line: its end is further on, or not there.
            after = line_end(file, self._offset + len(data), size) if len(data) == _CHUNK else None
            if after is None:
                break
            self._line += 1
            self._skip([(self._line, f"it is longer than {LINE} bytes")])
            self._offset = after
        self.tail = size - self._offset
        for parts in self._grown.values():
            # An agent that died between journal and acknowledgement may write a rank's part again: the last counts.
            by_seat = {part.seat: part for part in parts}
            if len(by_seat) < len(parts):
                parts[:] = by_seat.values()
        self._grown.clear()

    def _take(self, data: bytes) -> None:
        """Reads whole lines."""
        array = np.frombuffer(data, np.uint8)
        stops = np.flatnonzero(array == _LF)
        starts = np.concatenate(([0], stops[:-1] + 1))
        numbers = np.arange(self._line + 1, self._line + 1 + len(stops))
        self._line += len(stops)
        fit = (stops - starts > _HEAD + 1) & (stops - starts < LINE)
        skipped = self._misfits(numbers[~fit], f"it is shorter than a line can be, or longer than {LINE} bytes")
        numbers, starts, stops = numbers[fit], starts[fit], stops[fit]
        sound = _are_sound(array, starts, stops)
        skipped += self._misfits(numbers[~sound], "its checksum is wrong")
        text = data.decode() if data.isascii() else None
        add_part, usual, folder = self._add_part, _lines.usual, self._folder
        columns = (numbers[sound].tolist(), (starts[sound] + _HEAD).tolist(), (stops[sound] - 1).tolist())
        for number, start, stop in zip(*columns, strict=True):
            try:
                inner = data[start:stop].decode() if text is None else text[start:stop]
                part = usual(inner, folder)
                if part is None:
                    raw = _lines.decode(inner)
                    if raw["t"] != "part":
                        self._add_other(inner, raw)
                        continue
                    part = _lines.part(inner, raw, folder)
                add_part(*part)
            except MemoryError:
                raise
            except Exception as error:  # whatever is wrong with a line, the others are served
                skipped.append((number, _lines.reason(error)))
        self._skip(sorted(skipped))

    def _misfits(self, numbers: NDArray[np.int64], reason: str) -> list[tuple[int, str]]:
        """Lines to skip: the first by number, the others are counted."""
        self._unnamed += max(0, len(numbers) - PROBLEMS)
        return [(number, reason) for number in numbers[:PROBLEMS].tolist()]

    def _skip(self, lines: list[tuple[int, str]]) -> None:
        room = PROBLEMS - len(self._named)
        self._unnamed += max(0, len(lines) - room)
        for number, reason in lines[: max(0, room)]:
            self._named.append(safe(f"{self._path}: line {number} is skipped: {clip(reason)}"))

    def _add_part(self, identity: Identity, part: Part) -> None:
        at = part.at
        if at is not None and (end := at.offset + at.nbytes) > self.shard_ends.get(at.shard, 0):
            self.shard_ends[at.shard] = end
        parts = self.parts.get(identity)
        if parts is None:
            self.parts[identity] = [part]
        else:
            parts.append(part)
            self._grown[identity] = parts
        self.part_count += 1
        self.ranks.add(part.rank)

    def _add_other(self, text: str, raw: dict[str, Any]) -> None:
        kind = raw["t"]
        if kind in ("refused", "divergence"):
            identity, rank = _lines.what(text, raw)
            if kind == "refused":
                self.refused.append(Refusal(identity, rank, _lines.words(raw["reason"], "reason")))
            else:
                self.divergences.append(Divergence(identity, rank, _lines.number(raw["against"], "against", 32)))
        elif kind == "dropped":
            rank, count = _lines.number(raw["rank"], "rank", 32), _lines.number(raw["count"], "count", 64)
            _lines.origin(raw.get("from"))
            self.dropped.append(Dropped(rank, count, _lines.words(raw["reason"], "reason")))
        elif kind == "sealed":
            shard, length = _lines.words(raw["shard"], "shard"), _lines.number(raw["len"], "len", 63)
            shard = self._folder + shard
            self.shard_ends[shard] = max(length, self.shard_ends.get(shard, 0))
        else:
            raise ValueError(f"it is a {kind!r}, which this flexmodel does not know; install a newer one")

    def check_shards(self, problem: Callable[[str, int], str | None]) -> list[str]:
        """What `problem` says of each shard that the manifest names."""
        found: list[str] = []
        for stem, end in sorted(self.shard_ends.items()):
            if text := problem(stem, end):
                found.append(safe(text))
                if len(found) == PROBLEMS:
                    return [*found, f"{self._path}: other shards were not looked at"]
        return found


def _are_sound(data: NDArray[np.uint8], starts: NDArray[np.int64], stops: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether each line is `{"crc":"1a2b3c4d","rec":...}` with the checksum of what is inside."""
    heads = data[starts[:, None] + np.arange(_HEAD)]
    said = np.zeros(len(starts), np.uint32)
    for at in _DIGITS:
        said = said << np.uint32(4) | _NIBBLES[heads[:, at]]
    heads[:, _DIGITS] = np.where(_IS_DIGIT[heads[:, _DIGITS]], _ZERO, 0)
    framed = (heads == _FRAME).all(axis=1) & (data[stops - 1] == _CLOSING)
    return framed & (said == crc32c_of_ranges(data, starts + _HEAD, stops - 1))
