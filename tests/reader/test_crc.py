"""crc32c against the bitwise definition and its published check value."""

import numpy as np
import run_writer
from flexmodel._crc import crc32c, crc32c_of_ranges


def test_the_check_value():
    assert crc32c(b"123456789") == run_writer.crc32c(b"123456789") == 0xE3069283


def test_many_ranges_of_any_length():
    rng = np.random.default_rng(1)
    lengths = np.concatenate((np.arange(1, 300), rng.integers(1, 5000, 40)))
    gaps = rng.integers(0, 30, len(lengths))
    starts = np.cumsum(gaps + np.concatenate(([0], lengths[:-1])))
    data = rng.integers(0, 256, starts[-1] + lengths[-1] + 3, dtype=np.uint8)
    got = crc32c_of_ranges(data, starts, starts + lengths)
    want = [run_writer.crc32c(data[s : s + n].tobytes()) for s, n in zip(starts, lengths, strict=True)]
    assert got.tolist() == want
