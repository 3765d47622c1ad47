"""Run directories that somebody else made, each hostile or damaged in one way.

A case is a function that changes a sound run with the records `before` and `after`. It returns what readers must serve
of it: the names of the modules, or None where there is nothing to open.
"""

import json
import os
import pathlib
import socket
import struct
from collections.abc import Callable

import google_crc32c

HEADER_SPACE = 1 << 20
GIGA = 1 << 30
BOTH = {"before", "after"}
ESCAPES = "\x1b]0;owned\x07\x1b[2J\u009b31m\u202egnp.exe\r"

CASES: dict[str, Callable[["Run"], set[str] | None]] = {}


def case(build: Callable[["Run"], set[str] | None]) -> Callable[["Run"], set[str] | None]:
    CASES[build.__name__] = build
    return build


class Run:
    """A run with one open shard. `lines` come between the two sound records."""

    def __init__(self, root: pathlib.Path) -> None:
        self.root = root
        root.mkdir(parents=True)
        self.info = {"format": 1, "flexmodel": "0.1.0", "command": ["python", "x.py"], "finished_ns": 5, "world": 1}
        self.lines: list[bytes] = []
        self.tail = b""
        self.tensors = bytearray()

    def file(self, name: str) -> pathlib.Path:
        return self.root / name

    def part(self, module: str, value: bytes = b"abcdefgh", /, **changed: object) -> dict:
        """A part's record, with `value` in the shard."""
        start = HEADER_SPACE + len(self.tensors)
        at = {"shard": "shard-00000", "offset": start, "len": len(value), "crc": google_crc32c.value(value)}
        self.tensors += value + bytes(-len(value) % 64)
        return {
            "t": "part", "module": module, "kind": "forward", "path": "out", "model": 0, "step": 0, "micro": 0,
            "call": 0, "repeat": 0, "train": True, "class": "C", "group": "", "dtype": "uint8",
            "shape": [len(value)], "rank": 0, "axes": [], "dp_size": 1, "time_ns": 1, "at": at, "stats": None,
            **changed,
        }  # fmt: skip

    def add(self, record: dict | list | str | bytes) -> None:
        """A line around a record, or around any text, with the right checksum."""
        if not isinstance(record, str | bytes):
            record = json.dumps(record, separators=(",", ":"), ensure_ascii=False)
        inner = record.encode() if isinstance(record, str) else record
        self.lines.append(b'{"crc":"%08x","rec":%b}\n' % (google_crc32c.value(inner), inner))

    def write(self) -> None:
        """Writes the files that are not there."""
        lines, self.lines = self.lines, []
        self.add(self.part("before"))
        first, self.lines = self.lines, []
        self.add(self.part("after"))
        if not self.has("manifest.jsonl"):
            self.file("manifest.jsonl").write_bytes(b"".join([*first, *lines, *self.lines]) + self.tail)
        if not self.has("run.json"):
            self.file("run.json").write_text(json.dumps(self.info))
        if not self.has("shard-00000.open"):
            self.file("shard-00000.open").write_bytes(bytes(HEADER_SPACE) + self.tensors)

    def has(self, name: str) -> bool:
        return os.path.lexists(self.file(name))


def axis(index: object = 0, size: object = 1, place: object = "unknown", name: object = "dp") -> dict:
    return {"name": name, "index": index, "size": size, "place": place}


# --- files


@case
def sound(run: Run) -> set[str]:
    return BOTH


@case
def a_run_of_links(run: Run) -> set[str]:
    run.write()
    kept = run.root.with_name("kept")
    run.root.rename(kept)
    run.root.mkdir()
    for file in kept.iterdir():
        run.file(file.name).symlink_to(file)
    return BOTH


def _special(name: str, make: Callable[[pathlib.Path], object], what: str, left: set[str] | None) -> None:
    def build(run: Run) -> set[str] | None:
        make(run.file(name))
        return left

    build.__name__ = f"{name.partition('.')[0].replace('-', '_')}_is_{what}"
    case(build)


def _bind(path: pathlib.Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        here = os.open(path.parent, os.O_DIRECTORY)
        listener.bind(f"/proc/self/fd/{here}/{path.name}")  # a path may be too long for a socket's name
        os.close(here)


for _name, _left in (("manifest.jsonl", None), ("run.json", BOTH), ("shard-00000.open", BOTH)):
    _special(_name, os.mkfifo, "a_pipe", _left)
    _special(_name, lambda path: path.mkdir(), "a_directory", _left)
    _special(_name, lambda path: path.symlink_to("/dev/zero"), "a_device", _left)
    _special(_name, _bind, "a_socket", _left)
    _special(_name, lambda path: path.symlink_to(path.name), "a_link_to_itself", _left)


@case
def a_sparse_manifest(run: Run) -> set[str]:
    run.write()
    os.truncate(run.file("manifest.jsonl"), 1 << 40)
    return BOTH


@case
def a_hole_before_the_last_line(run: Run) -> set[str]:
    run.write()
    manifest = run.file("manifest.jsonl")
    lines = manifest.read_bytes()
    with manifest.open("r+b") as file:
        file.seek(1 << 40)
        file.write(b"\n" + lines.splitlines(keepends=True)[-1])
    return BOTH


@case
def a_sparse_run_json(run: Run) -> set[str]:
    run.write()
    os.truncate(run.file("run.json"), 1 << 40)
    return BOTH


@case
def a_sparse_shard(run: Run) -> set[str]:
    run.add(run.part("huge", shape=[1 << 40], at={**run.part("x")["at"], "len": 1 << 40}))
    run.write()
    os.truncate(run.file("shard-00000.open"), 1 << 42)
    return {*BOTH, "huge"}


@case
def a_sealed_shard_with_a_lying_header(run: Run) -> set[str]:
    run.add({"t": "sealed", "shard": "shard-00001", "len": 1 << 62})
    run.write()
    for number, length in ((1, 1 << 63), (2, HEADER_SPACE - 8), (3, 99 << 20)):
        file = run.file(f"shard-{number:05}.safetensors")
        entry = {"dtype": "F32", "shape": [1 << 62, 8], "data_offsets": [0, (1 << 64) - 1]}
        text = json.dumps({"a": entry, "b": {**entry, "data_offsets": [5, 1 << 63]}})
        file.write_bytes(struct.pack("<Q", length) + text.encode().ljust(HEADER_SPACE - 8))
        os.truncate(file, 1 << 40)
    return BOTH


# --- lines


BAD_LINES: dict[str, Callable[[Run], object]] = {}
"""Lines that say nothing. They are in one run, one after the other."""


@case
def lines_that_say_nothing(run: Run) -> set[str]:
    for record in BAD_LINES.values():
        run.add(record(run))
    return BOTH


REVISION = {
    "t": "revision", "revision": 1, "begins": 1, "rule": "optimizer", "ranks": 1, "clauses": [], "time_ns": 1,
}  # fmt: skip


def _line(name: str, record: Callable[[Run], object], left: set[str] = BOTH) -> None:
    def build(run: Run) -> set[str]:
        run.add(record(run))
        return left

    if left is BOTH:
        BAD_LINES[name] = record
    else:
        build.__name__ = name
        case(build)


_TENSORS = ("module", "kind", "path", "model", "step", "train", "class", "dtype", "shape", "rank", "axes", "time_ns")
for _field in _TENSORS:
    for _what, _value in (("null", None), ("an_object", {}), ("a_list", [[]]), ("a_fraction", 0.5), ("negative", -1)):
        _line(f"{_field}_is_{_what}", lambda run, f=_field, v=_value: run.part("bad", **{f: v}))
_OTHERS = ("at", ["shard-00000", 1 << 20, 8, 0]), ("at", "x"), ("stats", []), ("stats", {"count": "1"}), ("same", "x")
for _name, _value in (*_OTHERS, ("loss_scale", "1")):
    _line(f"{_name}_is_{type(_value).__name__}", lambda run, n=_name, v=_value: run.part("bad", **{n: v}))
for _name, _value in (
    ("step", 1 << 64), ("rank", 1 << 32), ("shape", [1 << 63]), ("shape", [1 << 32, 1 << 32]),
    ("shape", [0, 1 << 62, 1 << 62]), ("shape", [1] * 65), ("axes", [axis()] * 5000), ("axes", [axis(2, 2)]),
    ("axes", [axis(0, 1, {"shard": {"dim": 9}})]), ("axes", [axis(0, 1, "twisted")]),
    ("axes", [axis(0, 1, {"flat": {"shape": [1] * 65}})]), ("module", "m" * 20000), ("class", "m" * 20000),
    ("at", {"shard": "shard-00000", "offset": (1 << 64) - 1, "len": 2, "crc": 0}),
    ("at", {"shard": "shard-00000", "offset": 1 << 62, "len": 1 << 62, "crc": 0}),
):  # fmt: skip
    _line(f"{_name}_is_out_of_range_{len(BAD_LINES)}", lambda run, n=_name, v=_value: run.part("bad", **{n: v}))


def _text(name: str, change: Callable[[str], str | bytes]) -> None:
    _line(name, lambda run: change(json.dumps(run.part("bad"), separators=(",", ":"))))


_text("an_integer_of_5000_digits", lambda text: text.replace('"step":0', '"step":' + "9" * 5000))
_text("a_float_beyond_all", lambda text: text.replace('"rank":0', '"rank":0,"loss_scale":1e400'))
_text("not_a_number", lambda text: text.replace('"rank":0', '"rank":0,"loss_scale":NaN'))
_text("infinity_where_nobody_looks", lambda text: text.replace('"rank":0', '"rank":0,"later":Infinity'))
_text("a_field_twice", lambda text: text.replace('"step":0', '"step":0,"step":1'))
_text("a_field_twice_in_an_object", lambda text: text.replace('"len":8', '"len":8,"len":8'))
_text("half_a_surrogate_pair", lambda text: text.replace('"bad"', '"\\ud800"'))
_text("deep_arrays", lambda text: text.replace('"rank":0', '"rank":0,"deep":' + "[" * 20000 + "]" * 20000))
_text("rather_deep_arrays", lambda text: text.replace('"rank":0', '"rank":0,"deep":' + "[" * 200 + "]" * 200))
_text("deep_objects", lambda text: text.replace('"axes":[]', '"axes":' + '{"a":' * 20000 + "1" + "}" * 20000))
_text("more_behind_it", lambda text: text + " {}")
_text("no_utf8", lambda text: text.encode().replace(b'"bad"', b'"\xff\xfe"'))
_text("a_control_character", lambda text: text.replace('"bad"', '"\x01"'))
_line("a_list", lambda run: [1])
_line("a_number", lambda run: "7")
_line("an_unknown_kind", lambda run: {"t": "omen"})
_line("dropped_out_of_range", lambda run: {"t": "dropped", "rank": 0, "count": 1 << 64, "reason": "x"})
for _name, _value in (
    ("revision", 0), ("begins", -1), ("rule", "never"), ("clauses", [[1, "a"]]),
    ("clauses", [{"id": 1 << 32, "text": ""}]), ("clauses", [{"id": 1, "text": ""}] * 49153),
    ("clauses", [{"id": n, "text": "x" * 1000} for n in range(50)]),
):  # fmt: skip
    _line(f"{_name}_of_hooks_is_out_of_range_{len(BAD_LINES)}", lambda run, n=_name, v=_value: {**REVISION, n: v})
_line("a_field_of_a_later_version", lambda run: run.part("later", color="red", deep=[[1]]), {*BOTH, "later"})
_line("a_name_with_a_zero", lambda run: run.part("a\0b/../c\n"), {*BOTH, "a\0b/../c\n"})
for _name, _changed in (
    ("a_shard_elsewhere", {"shard": "../../etc/passwd"}), ("bytes_of_the_header", {"offset": 0}),
    ("bytes_behind_the_end", {"offset": 1 << 40}),
):  # fmt: skip
    _line(_name, lambda run, c=_changed: run.part("x", at={**run.part("y")["at"], **c}), {*BOTH, "x"})
_line("an_axis_of_four_billion", lambda run: run.part("x", axes=[axis(3, (1 << 32) - 1)] * 2), {*BOTH, "x"})
_line(
    "missing_along_sixty_axes",
    lambda run: run.part("x", axes=[axis(1, 1 << 31, {"shard": {"dim": 0}}, f"a{n}") for n in range(60)]),
    {*BOTH, "x"},
)


@case
def counts_that_overflow(run: Run) -> set[str]:
    for _ in range(3):
        run.add({"t": "dropped", "rank": 0, "count": (1 << 64) - 1, "reason": "x"})
    return BOTH


@case
def a_line_of_two_gigabytes(run: Run) -> set[str]:
    run.write()
    manifest = run.file("manifest.jsonl")
    first, last = manifest.read_bytes().splitlines(keepends=True)
    with manifest.open("wb") as file:
        file.write(first + b"x" * (40 << 20))
        file.seek(2 * GIGA, os.SEEK_CUR)
        file.write(b"x" * 5 + b"\n" + last)
    return BOTH


@case
def a_million_empty_lines(run: Run) -> set[str]:
    run.lines = [b"\n" * 2_000_000]
    return BOTH


@case
def many_lines_with_a_wrong_checksum(run: Run) -> set[str]:
    run.lines = [b'{"crc":"00000000","rec":{}}\n' * 200_000]
    return BOTH


@case
def one_part_again_and_again(run: Run) -> set[str]:
    record = run.part("again")
    for _ in range(2_000):
        run.lines.append(run.lines[0]) if run.lines else run.add(record)
    return {*BOTH, "again"}


@case
def one_record_of_many_ranks(run: Run) -> set[str]:
    record = run.part("wide")
    for rank in reversed(range(8000)):
        own = {**record, "rank": rank, "axes": [axis(rank, 1 << 30, {"shard": {"dim": 0}})]}
        own["at"], own["same"] = (None, rank) if rank % 2 else (record["at"], None)
        run.add(own)
    return {*BOTH, "wide"}


@case
def pieces_that_share_their_bytes(run: Run) -> set[str]:
    size = 64 << 20
    whole = {**run.part("x")["at"], "len": size}
    for rank in range(400):
        place = {"shard": {"dim": 0}}
        run.add(run.part("shared", b"", shape=[size], rank=rank, axes=[axis(rank, 400, place)], at=whole))
    run.write()
    os.truncate(run.file("shard-00000.open"), HEADER_SPACE + 2 * size)
    return {*BOTH, "shared"}


@case
def records_that_share_their_bytes(run: Run) -> set[str]:
    size = 64 << 20
    for step in range(1000):
        at = {"shard": "shard-00000", "offset": HEADER_SPACE + 64 * step, "len": size, "crc": step}
        run.add(run.part("shared", b"", shape=[size], step=step, at=at))
    run.write()
    os.truncate(run.file("shard-00000.open"), HEADER_SPACE + 2 * size)
    return {*BOTH, "shared"}


@case
def names_that_differ_in_nothing_that_a_file_system_takes(run: Run) -> set[str]:
    names = {f"{a}{b}{c}" for a in "*?!#" for b in "<>|&" for c in "äöüß"}
    for name in sorted(names):
        run.add(run.part(name, b"x"))
    return BOTH | names


@case
def names_of_a_thousand_numbers(run: Run) -> set[str]:
    names = {"1." * 3000 + str(n) for n in range(40)} | {"9" * 5000}
    for name in sorted(names):
        run.add(run.part(name, b"x"))
    return BOTH | names


@case
def shards_by_the_thousand(run: Run) -> set[str]:
    for number in range(5000):
        run.add({"t": "sealed", "shard": f"shard-{number + 7:05}", "len": 1 << 20})
    run.add({"t": "sealed", "shard": "shard-4294967295", "len": 1 << 20})
    return BOTH


@case
def names_that_a_terminal_obeys(run: Run) -> set[str]:
    run.info |= {"hooks": ESCAPES, "command": [ESCAPES], "node": ESCAPES, "notices": [ESCAPES], "torch": ESCAPES}
    what = {k: v for k, v in run.part("refused").items() if k not in ("at", "stats")}
    run.add(run.part(ESCAPES, path=ESCAPES, **{"class": ESCAPES, "group": ESCAPES}))
    run.add(run.part("odd" + ESCAPES, at={**run.part("y")["at"], "shard": ESCAPES}))
    run.add({**what, "module": ESCAPES, "t": "refused", "reason": ESCAPES})
    run.add({**what, "module": ESCAPES, "t": "divergence", "against": 1})
    run.add({"t": "dropped", "rank": 0, "count": 1, "reason": ESCAPES})
    run.add(run.part("bad", kind=ESCAPES))
    return {*BOTH, ESCAPES, "odd" + ESCAPES}


# --- run.json


def _info(name: str, **changed: object) -> None:
    def build(run: Run) -> set[str]:
        run.info |= changed
        return BOTH

    build.__name__ = f"run_json_with_{name}"
    case(build)


_info("a_world_of_four_billion", world=(1 << 32) - 1, owners=[
    {"model": 0, "ranks": [0], "modules": ["before"]}, {"model": 0, "ranks": [1], "modules": ["after"]},
])  # fmt: skip
_info("groups_that_multiply", world=3000, models=[{"model": n, "modules": []} for n in range(64)], owners=[
    {"model": n % 8 if n else None, "ranks": list(range(3000)), "modules": [f"m{k}" for k in range(3000)]}
    for n in range(16)
])  # fmt: skip
_info("too_many_models", models=[{"model": n, "modules": []} for n in range(20_000)])
_info("too_many_notices", notices=["x"] * 100_000)
for _name, _value in (
    ("world", "2"), ("world", -1), ("world", 1 << 32), ("hooks", None), ("command", "ls"), ("command", [1]),
    ("models", {}), ("models", [[0, []]]), ("models", [1]), ("models", [{"model": 0}]), ("owners", [{"ranks": "x"}]),
    ("notices", [None]), ("totals", []),
    ("totals", {"parts": "x"}), ("finished_ns", 1e30), ("exit_code", 1 << 40), ("started_ns", [[]]),
):  # fmt: skip
    _info(f"{_name}_of_another_type_{len(CASES)}", **{_name: _value})


def _raw_info(name: str, text: bytes) -> None:
    def build(run: Run) -> set[str]:
        run.file("run.json").write_bytes(text)
        return BOTH

    build.__name__ = f"run_json_is_{name}"
    case(build)


_raw_info("deep", b'{"format":1,"models":' + b"[" * 100_000 + b"]" * 100_000 + b"}")
_raw_info("no_object", b"[1]")
_raw_info("no_json", b"\xff\x00\x1b[2J")
_raw_info("an_integer_of_5000_digits", b'{"format":1,"world":' + b"9" * 5000 + b"}")
