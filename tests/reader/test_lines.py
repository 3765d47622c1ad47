"""A line of the manifest says the same whichever way it is read, and a damaged one says nothing either way."""

import json
import random

import pytest
from flexmodel import _lines
from run_writer import Writer, axis, shard

STATS = dict.fromkeys(("count", "nan", "inf", "zero"), 4)
STATS |= {"mean": -0.5, "std": 0.0, "l2": 1.5, "absmax": 1.0, "min": -1.0, "max": 1.0}
AT = {"shard": "shard-00000", "offset": 1 << 20, "len": 16, "crc": 7}
TOKENS = (
    '"class":', ',"time_ns":1', ',', '{', '}', '[', ']', '-1', '-0', '1.5', '1e400', 'NaN', 'null', 'true', '"x"',
    '"step":1,', '"axes":[],', '"at":null,', '"same":3,', '"loss_scale":1.0,', '"t":"part",', '"later":[1],',
    '\\', '\\ud800',
)  # fmt: skip


def lines() -> list[str]:
    """As an agent writes them."""
    found = []
    for rank in range(2):
        what = Writer.what("layers.0.mlp", "float32", (2, 2), rank, [axis(rank, 2, shard(0))])
        time_ns = what.pop("time_ns")
        for at, stats in ((AT, STATS), (None, STATS), (AT, None)):
            found.append({"t": "part", **what, "loss_scale": 1.0, "time_ns": time_ns, "at": at, "stats": stats})
    return [json.dumps(line, separators=(",", ":")) for line in found]


def outcome(text: str, quick: bool) -> object:
    """What is made of a line; None where it is not taken, and "not usual" where it is for the other way to say."""
    try:
        if quick:
            return _lines.usual(text, "node/") or "not usual"
        raw = _lines.decode(text)
        return _lines.part(text, raw, "node/") if raw["t"] == "part" else None
    except Exception:
        return None


@pytest.mark.parametrize("text", lines())
def test_what_an_agent_writes_is_read_the_quick_way(text: str):
    assert outcome(text, True) == outcome(text, False) != "not usual"
    assert outcome(text, True) is not None


@pytest.mark.parametrize("text", lines())
def test_a_line_of_an_older_version_says_the_same(text: str):
    older = text.replace('"train":true', '"train":true,"recompute":false')
    older = older.replace('{"dim":0}', '{"dim":0,"offset":null}')
    assert older.count("recompute") == older.count('"offset":null') == 1
    assert outcome(older, True) == outcome(older, False) == outcome(text, False)


@pytest.mark.parametrize("seed", range(20))
def test_both_ways_take_and_refuse_the_same(seed: int):
    choose = random.Random(seed)
    for _ in range(300):
        text = choose.choice(lines())
        for _ in range(choose.choice((1, 1, 2))):
            start = choose.randrange(len(text))
            end = start + choose.randrange(12)
            new = choose.choice((choose.choice(TOKENS), "", text[start:end] * 2))
            text = text[:start] + new + text[choose.choice((start, end)) :]
        quick = outcome(text, True)
        assert quick == "not usual" or quick == outcome(text, False), text
