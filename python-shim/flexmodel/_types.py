"""The plain values that a run directory holds. They mirror `agent/run/src/format.rs`, which defines them."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from . import _native

KINDS = tuple(_native.kinds())
"""Every kind of record, in the order of their codes."""


class Identity(NamedTuple):
    """What tells one record from every other. The parts of a record share it."""

    module: str
    kind: str
    path: str
    model: int
    step: int
    micro: int
    call: int
    repeat: int
    train: bool
    job: int = 0
    attempt: int = 0
    again: int = 0


@dataclass(frozen=True)
class Axis:
    """How a part lies along one mesh axis.

    `place` is `replicate`, `shard`, `replicate_or_shard`, `head_tail` (a piece of `dim` from the head and one as long
    from the tail), `flat`, `partial` or `unknown`; `dim` is -1 for those of no dimension. `shape` is, for `flat`, that
    of the tensor of whose elements the part is a run; else None.
    `input_digest` is of what this rank's model was given, where nothing says that ranks have rows of the batch of
    their own: where two were given the same they have not, and `place` counts as `unknown`.
    """

    name: str
    index: int
    size: int
    place: str
    dim: int
    shape: tuple[int, ...] | None = None
    input_digest: int | None = None


class Location(NamedTuple):
    """Where a part's bytes are: `nbytes` at `offset` of a shard's file, with their crc32c."""

    shard: str
    offset: int
    nbytes: int
    crc: int


class Part(NamedTuple):
    """What one rank captured of one tensor: its own `shape`, `dtype` (torch's name) and place in the whole.

    `stats` are of this part alone; None for dtypes without. `at` is None where only statistics were kept, and where
    this rank sent nothing but `same`: the crc32c of bytes that are those of a replica that another rank sent, if all is
    well.
    """

    rank: int
    dtype: str
    shape: tuple[int, ...]
    axes: tuple[Axis, ...]
    at: Location | None
    class_name: str
    group: str
    dp_size: int
    loss_scale: float
    time_ns: int
    stats: Stats | None
    same: int | None = None

    @property
    def seat(self) -> tuple[int, int]:
        """The rank and which microbatch of a pipeline's step: no two parts of a record have the same."""
        return self.rank, next((axis.index for axis in self.axes if axis.name == "micro"), 0)

    @property
    def crc(self) -> int | None:
        """crc32c of its bytes, if any rank sent them."""
        return self.at.crc if self.at else self.same

    @property
    def nbytes(self) -> int:
        """Bytes stored; 0 where only statistics were kept."""
        return self.at.nbytes if self.at else 0


@dataclass(frozen=True)
class Stats:
    """Statistics of a tensor's finite elements; complex elements count by magnitude.

    `mean`, `std` (population), `l2`, `absmax`, `min` and `max` are None where there is no finite element.
    """

    count: int
    mean: float | None
    std: float | None
    l2: float | None
    absmax: float | None
    min: float | None
    max: float | None
    nan: int
    inf: int
    zero: int


@dataclass(frozen=True)
class _OfRecord:
    what: Identity
    rank: int

    @property
    def module(self) -> str:
        """Name of the module."""
        return self.what.module

    @property
    def kind(self) -> str:
        """What of the module."""
        return self.what.kind

    @property
    def path(self) -> str:
        """Leaf in its inputs or outputs."""
        return self.what.path

    @property
    def step(self) -> int:
        """Optimizer steps so far."""
        return self.what.step


@dataclass(frozen=True)
class Refusal(_OfRecord):
    """A tensor that was not captured on `rank`, and why. `what` is all that a record would say of it."""

    reason: str


@dataclass(frozen=True)
class Divergence(_OfRecord):
    """A replica on `rank` that should equal the one on rank `against` and does not. `what` is its record."""

    against: int


@dataclass(frozen=True)
class Dropped:
    """`count` parts that were lost on `rank`, and why."""

    rank: int
    count: int
    reason: str


@dataclass(frozen=True)
class ModuleInfo:
    """One module of a model. `kinds` are those that are tapped; empty where no hook selected it."""

    name: str
    class_name: str
    kinds: tuple[str, ...]


@dataclass(frozen=True)
class ModelInfo:
    """A model of the job: its number, and its modules in `named_modules` order."""

    model: int
    modules: tuple[ModuleInfo, ...]


@dataclass(frozen=True)
class Owners:
    """Ranks that have the same `modules` of a model; `model` None: of all models of which they capture nothing."""

    model: int | None
    ranks: tuple[int, ...]
    modules: tuple[str, ...]
    job: int = 0
    attempt: int = 0


@dataclass(frozen=True)
class Totals:
    """Counters over all ranks; final once the run is finished."""

    records: int = 0
    parts: int = 0
    bytes: int = 0
    dropped: int = 0
    refused: int = 0
    divergences: int = 0


@dataclass(frozen=True)
class Job:
    """An attempt of a job that wrote into the run: `job` and `attempt` are those of its records.

    Jobs are numbered in the order in which they were first seen. `attempt` is how often its launcher had started the
    ranks again. `group`, `launch` and `launcher` are what it was told from others by: the number of its process group
    in hexadecimal (empty where it has none), what the launcher calls it or where its ranks meet, and who started them.
    """

    job: int
    attempt: int
    world: int
    command: tuple[str, ...]
    hooks: str
    started_ns: int
    group: str
    launch: str
    launcher: str


@dataclass(frozen=True)
class Revision:
    """Hooks that took the place of others while an attempt of a job ran. Those it was started with are revision 0.

    `clauses` are all that it has, as they were written, by the numbers under which they can be removed. `step` is the
    step that it began with, and the first whose records have it as their `revision`. It is None where there was none:
    in inference (`rule` is then `inference`), where `begins` counts the forward passes of all models, and where each of
    the `ranks` began at a pass of its own: then `begins` is None too.
    """

    revision: int
    step: int | None
    clauses: dict[int, str] = field(hash=False)
    job: int
    attempt: int
    begins: int | None
    rule: str
    ranks: int
    time_ns: int


@dataclass(frozen=True)
class RunInfo:
    """`run.json`: what was run, by what, and how it ended.

    `finished_ns` and `exit_code` are None while the run goes on, or if its agent died. `owners` is of those ranks that
    have said which modules they have. `steps` are the rules by which steps were counted, in the order in which they
    came into force: `inference` (each forward pass of a model is one), `optimizer` (one ends where an optimizer stepped
    or was skipped), `backward` (where a backward pass ended, in a process that has made no optimizer).
    """

    format: int = 1
    flexmodel: str = ""
    command: tuple[str, ...] = ()
    hooks: str = ""
    started_ns: int = 0
    finished_ns: int | None = None
    exit_code: int | None = None
    world: int = 0
    node: str = ""
    torch: str = ""
    python: str = ""
    wrapper: str = ""
    steps: tuple[str, ...] = ()
    models: tuple[ModelInfo, ...] = ()
    owners: tuple[Owners, ...] = ()
    notices: tuple[str, ...] = ()
    totals: Totals = Totals()


def part(raw: dict[str, Any]) -> Part:
    """From what the reader took of a line of the manifest."""
    at, stats = raw["at"], raw["stats"]
    fields = raw | {
        "class_name": raw["class"],
        "shape": tuple(raw["shape"]),
        "axes": tuple(map(_axis, raw["axes"])),
        "loss_scale": float(raw["loss_scale"]),
        "at": at and Location(at["shard"], at["offset"], at["len"], at["crc"]),
        "stats": stats and Stats(**stats),
    }
    return Part(**{name: fields[name] for name in Part._fields if name in fields})


@functools.lru_cache(4096)
def layout(raw: str) -> tuple[Axis, ...]:
    """From the JSON of a layout; many records have the same."""
    return tuple(map(_axis, json.loads(raw)))


def _axis(raw: dict[str, Any]) -> Axis:
    place = raw["place"]
    name, details = (place, {}) if isinstance(place, str) else next(iter(place.items()))
    shape = tuple(details["shape"]) if "shape" in details else None
    return Axis(raw["name"], raw["index"], raw["size"], name, details.get("dim", -1), shape, raw.get("input_digest"))


def jobs(raw: str) -> list[Job]:
    """From the JSON of the reader. Which of the ranks are on a node is for the reader to know."""
    none = {"job": 0, "attempt": 0}
    every = (none | each | {"command": tuple(each["command"])} for each in json.loads(raw))
    return [Job(**{name: value for name, value in each.items() if name != "here"}) for each in every]


def revisions(raw: str) -> list[Revision]:
    """From the JSON of the reader. Which number a clause gets next is for the agent to know."""
    none = {"job": 0, "attempt": 0}
    every = (none | each for each in json.loads(raw))
    return [
        Revision(**{name: value for name, value in each.items() if name != "last_id"} | {
            "step": None if each["rule"] == "inference" else each["begins"],
            "clauses": {clause["id"]: clause["text"] for clause in each["clauses"]},
        })
        for each in every
    ]  # fmt: skip


def run_info(raw: dict[str, Any]) -> RunInfo:
    """From what the reader took of `run.json`."""
    models = tuple([ModelInfo(model["model"], tuple(map(_module, model["modules"]))) for model in raw["models"]])
    owners = tuple([
        Owners(own["model"], tuple(own["ranks"]), tuple(own["modules"]), own.get("job", 0), own.get("attempt", 0))
        for own in raw["owners"]
    ])  # fmt: skip
    return RunInfo(**{
        **raw, "command": tuple(raw["command"]), "models": models, "owners": owners,
        "steps": tuple(raw["steps"]), "notices": tuple(raw["notices"]), "totals": Totals(**raw["totals"]),
    })  # fmt: skip


def _module(raw: dict[str, Any]) -> ModuleInfo:
    kinds = tuple([kind for bit, kind in enumerate(KINDS) if raw["kinds"] >> bit & 1])
    return ModuleInfo(raw["name"], raw["class"], kinds)
