"""Bytes out of shard files, mapped rather than copied where that pays."""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ._dtypes import Bytes
from ._errors import RunError
from ._files import open_to_read
from ._text import clip

_MAP_FROM = 1 << 16  # bytes; a smaller tensor is read faster than it is mapped
# Pages are copied only when written: nothing need be set aside for a tensor larger than the free memory.
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
_STEM = re.compile(r"[A-Za-z0-9_-]{1,200}")
HEADER_SPACE = 1 << 20
"""Bytes at the start of a shard that belong to its header."""


class Shards:
    """The shard files of a run directory; those of `nodes`, folders in it, are called `NODE/STEM`."""

    def __init__(self, root: Path, nodes: Sequence[str] = ()) -> None:
        self._root = root
        self._nodes = nodes

    def read(self, stem: str, offset: int, nbytes: int) -> Bytes:
        """`nbytes` at `offset` of a shard, as a writable array that is the caller's own.

        Writing to it never changes the file. RunError if the shard is missing or too short.
        """
        fd = self._open(stem)
        try:
            size = os.fstat(fd).st_size
            if offset < HEADER_SPACE:
                raise RunError(f"{self._root}: bytes {offset}+{nbytes} of {stem} are outside of its tensors")
            if offset + nbytes > size:
                raise RunError(self._too_short(stem, size, offset + nbytes))
            if nbytes >= _MAP_FROM:
                mapped = _map(fd, offset, nbytes)
                if mapped is not None:
                    return mapped
            return _copy(fd, stem, offset, nbytes)
        finally:
            os.close(fd)

    def problem(self, stem: str, end: int) -> str | None:
        """What is wrong with a shard that the manifest needs `end` bytes of; None if nothing is."""
        try:
            fd = self._open(stem)
        except RunError as error:
            return str(error)
        try:
            size = os.fstat(fd).st_size
        finally:
            os.close(fd)
        return self._too_short(stem, size, end) if size < end else None

    def _too_short(self, stem: str, size: int, end: int) -> str:
        return (
            f"{self._root}: {stem} is cut short: it has {size} bytes and the manifest names {end}; "
            f"copy the run again from where it was written, or see `flexmodel verify` for what is lost"
        )

    def _open(self, stem: str) -> int:
        node, slash, name = stem.rpartition("/")
        if not _STEM.fullmatch(name) or (slash and node not in self._nodes):
            raise RunError(f"{self._root}: the manifest names the shard {clip(stem)!r}, which is no name of a shard")
        # Sealing renames .open to .safetensors, perhaps between two tries.
        for suffix in (".safetensors", ".open", ".safetensors"):
            try:
                return open_to_read(self._root / (stem + suffix))
            except FileNotFoundError:
                continue
            except OSError as error:
                raise RunError(f"{self._root}: {stem}{suffix} cannot be opened: {error.strerror}") from error
        raise RunError(
            f"{self._root}: {stem}.safetensors is missing, and {stem}.open too; "
            f"copy the run again from where it was written"
        )


def room(shape: tuple[int, ...]) -> Bytes:
    """An array for bytes. RunError where there is no memory for it."""
    try:
        return np.empty(shape, np.uint8)
    except (MemoryError, ValueError) as error:  # ValueError: more than an array can have
        raise RunError(f"there is no memory for {math.prod(shape)} bytes ({error})") from None


def _copy(fd: int, stem: str, offset: int, nbytes: int) -> Bytes:
    out = room((nbytes,))
    view = memoryview(out)  # type: ignore[arg-type]  # numpy's stubs do not say so before Python 3.12
    at = 0
    while at < nbytes:
        try:
            n = os.preadv(fd, [view[at:]], offset + at)
        except OSError as error:
            raise RunError(f"{stem} cannot be read at byte {offset + at}: {error.strerror}") from error
        if not n:
            raise RunError(f"{stem} ends at byte {offset + at}; it was cut while it was read")
        at += n
    return out


class _Mapping:
    """A private mapping of a file, unmapped when the last array over it is gone.

    The `mmap` module keeps a file descriptor for as long as the mapping lives (before Python 3.13), so that a thousand
    tensors would use up the process's descriptors. Hence mmap itself.
    """

    _libc: Any = None

    def __init__(self, fd: int, offset: int, length: int) -> None:
        cls = type(self)
        if cls._libc is None:
            libc = ctypes.CDLL(None, use_errno=True)
            libc.mmap.restype = ctypes.c_void_p
            libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
            libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
            cls._libc = libc
        self._address: int | None = None
        self._length = length
        protection, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | _NO_RESERVE
        address = self._libc.mmap(None, length, protection, flags, fd, offset)
        if address == ctypes.c_void_p(-1).value:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        self._address = address
        self.__array_interface__ = {"version": 3, "data": (address, False), "shape": (length,), "typestr": "|u1"}

    def __del__(self) -> None:
        if self._address is not None:
            self._libc.munmap(self._address, self._length)
            self._address = None


def _map(fd: int, offset: int, nbytes: int) -> Bytes | None:
    """A mapping of the range; None where the system gives no more of them."""
    skip = offset % mmap.ALLOCATIONGRANULARITY
    try:
        mapping = _Mapping(fd, offset - skip, nbytes + skip)
    except OSError:
        return None
    array: Bytes = np.asarray(mapping)
    return array[skip:]
