"""crc32c of many short byte strings at once, in numpy.

A crc is linear: with a zero start it is the exclusive-or over the bytes of a table entry that depends on the byte and
on its distance from the end. One gather and one reduction then serve a whole batch of lines.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_BATCH = 128  # lines at a time: the batch's temporaries stay in the cache
_LONGEST = 4096  # bytes; longer lines, which are rare, go in blocks


def _byte_table() -> NDArray[np.uint32]:
    crc = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        crc = np.where(crc & 1, (crc >> np.uint32(1)) ^ np.uint32(0x82F63B78), crc >> np.uint32(1))
    return crc


_BYTE = _byte_table()
_BYTE_LIST: list[int] = _BYTE.tolist()
_distance = _BYTE.reshape(1, 256)  # [distance from the end, byte]; grows on demand


def crc32c(data: bytes) -> int:
    """The crc32c of `data`, byte by byte."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _BYTE_LIST[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def crc32c_of_ranges(
    data: NDArray[np.uint8], starts: NDArray[np.int64], ends: NDArray[np.int64]
) -> NDArray[np.uint32]:
    """The crc32c of each `data[starts[i]:ends[i]]`. Ranges are in order, do not overlap, and none is empty."""
    out = np.zeros(len(starts), np.uint32)
    lengths = ends - starts
    long = lengths > _LONGEST
    for i in np.flatnonzero(long).tolist():
        out[i] = _of_long(data[starts[i] : ends[i]])
    short = np.flatnonzero(~long)
    if not len(short):
        return out
    table, places, begin = _tables(int(lengths[short].max()))
    flat = table.ravel()
    for at in range(0, len(short), _BATCH):
        rows = short[at : at + _BATCH]
        n = lengths[rows]
        # Index of every byte into the table: its distance from its line's end, and its value.
        index = np.concatenate([places[-k:] for k in n.tolist()])
        index += np.concatenate([data[a:b] for a, b in zip(starts[rows].tolist(), ends[rows].tolist(), strict=True)])
        first = np.concatenate(([0], np.cumsum(n)[:-1]))
        out[rows] = np.bitwise_xor.reduceat(flat.take(index), first) ^ begin[n] ^ np.uint32(0xFFFFFFFF)
    return out


def _of_long(data: NDArray[np.uint8]) -> int:
    """Block by block: what is so far moves on by a block's length, and the block's own bytes are added."""
    table, places, begin = _tables(_LONGEST)
    flat = table.ravel()
    head = len(data) % _LONGEST or _LONGEST
    crc = int(np.bitwise_xor.reduce(flat[places[-head:] + data[:head]]) ^ begin[head])
    for at in range(head, len(data), _LONGEST):
        block = int(np.bitwise_xor.reduce(flat[places + data[at : at + _LONGEST]]))
        # The four bytes of a state count as if they were the first ones of the block.
        state = np.array([crc & 0xFF, crc >> 8 & 0xFF, crc >> 16 & 0xFF, crc >> 24], np.int64)
        crc = block ^ int(np.bitwise_xor.reduce(flat[places[:4] + state]))
    return crc ^ 0xFFFFFFFF


def _tables(longest: int) -> tuple[NDArray[np.uint32], NDArray[np.int64], NDArray[np.uint32]]:
    """The table by distance and byte; where in it the longest line's bytes are; the start value after n zero bytes."""
    global _distance
    if len(_distance) < longest:
        size = min(_LONGEST, 1 << (longest - 1).bit_length())
        grown = np.empty((size, 256), np.uint32)
        grown[0] = _BYTE
        for k in range(1, size):
            grown[k] = _BYTE[grown[k - 1] & 0xFF] ^ (grown[k - 1] >> np.uint32(8))
        _distance = grown
    begin = np.empty(longest + 1, np.uint32)
    crc = 0xFFFFFFFF
    for k in range(longest + 1):
        begin[k] = crc
        crc = _BYTE_LIST[crc & 0xFF] ^ (crc >> 8)
    return _distance, np.arange(len(_distance) - 1, -1, -1, np.int64) << 8, begin
