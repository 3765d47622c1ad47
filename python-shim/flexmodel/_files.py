"""Files of a run directory, opened whatever somebody put in their place.

Links are followed: a run may be a folder of links to where its files are kept. What is behind one must be a file:
opening a pipe would wait for its writer, and a device may do anything.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from ._errors import RunError

_FLAGS = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)
_KINDS = (
    (stat.S_ISDIR, "a directory"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"), (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)  # fmt: skip


def open_to_read(path: Path) -> int:
    """A descriptor of the file at `path`. OSError if it does not open, RunError if it is no file."""
    try:
        fd = os.open(path, _FLAGS)
    except OSError as error:
        if error.errno == errno.ENXIO:  # a socket, or a device without a driver
            raise RunError(f"{path} is not a file") from None
        raise
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode):
        return fd
    os.close(fd)
    kind = next((name for is_one, name in _KINDS if is_one(mode)), "something else")
    raise RunError(f"{path} is {kind}, not a file")


def read_whole(path: Path, limit: int) -> bytes:
    """What is in a file. RunError if that is more than `limit` bytes, OSError as `open_to_read`."""
    with open(open_to_read(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise RunError(f"it has {size} bytes, and no more than {limit} are read")
        return file.read(limit)


def line_end(fd: int, offset: int, size: int) -> int | None:
    """Where the next line begins at or after `offset` in a file of `size` bytes; None if no line ends there.

    Holes, which have no line ends, are passed over: looking takes as long as what is on the disk.
    """
    while offset < size:
        try:
            offset = os.lseek(fd, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole up to the end
                return None
        data = os.pread(fd, min(1 << 20, size - offset), offset)
        if not data:
            return None
        found = data.find(b"\n")
        if found >= 0:
            return offset + found + 1
        offset += len(data)
    return None
