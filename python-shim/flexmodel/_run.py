"""A run directory, opened for reading."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from . import _assemble, _info, _nodes, _record, _select
from ._assemble import Coordinates
from ._errors import RunError, RunNotFoundError
from ._files import read_whole
from ._limits import DEPTH, RUN_FILE_BYTES
from ._lines import reason
from ._manifest import Manifest, uncollected
from ._nodes import MANIFEST_FILE, RUN_FILE, Manifests
from ._owners import Scattered
from ._record import Record, Source
from ._shards import Shards
from ._text import clip, safe
from ._types import KINDS, Divergence, Dropped, Identity, ModelInfo, Part, Refusal, RunInfo

FORMAT = 2
"""The newest format of a run directory that is understood here."""


def open_run(path: str | os.PathLike[str]) -> Run:
    """Opens the run directory `path` (what `flexmodel run --out` was given), finished or still being written.

    A folder that holds the runs of one job's nodes is opened as the job's run, with tensors whole over all nodes.

    RunNotFoundError (a FileNotFoundError) if there is none; RunError (a ValueError) if it is not one or cannot be read.
    A damaged line or shard is no error: see `Run.problems`. Does not import torch.
    """
    return Run(path)


class Run:
    """A run directory. Lists of records stay as they are until `refresh()`; treat them as read-only.

    `run[module]` are that module's records of every kind, `run.get(module, ...)` is one tensor; `module in run`,
    `len(run)` and `for module in run` are about `run.modules`.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.nodes = _expect_run(self.path)
        self.info = RunInfo()
        self._manifest: Manifest | Manifests
        self._manifest = Manifests(self.path, self.nodes) if self.nodes else Manifest(self.path / MANIFEST_FILE)
        self._shards = Shards(self.path, self.nodes)
        self._source = Source(self._shards, self._seats, lambda: self._manifest.dropped)
        self._problems: list[str] = []
        self.refresh()

    def refresh(self) -> int:
        """Reads what a running job has written since; returns how many parts are new."""
        before = self._manifest.part_count
        problems = self._read_info()  # before the manifest: a finished run's manifest ends with a whole line
        self._manifest.refresh()
        if problems and not self._manifest.parts:
            raise RunError(f"{problems[0]}, and there is no readable record: this is no run, or nothing of it is left")
        self._problems = [safe(f"{problem}; the records are served without it") for problem in problems]
        for manifest in self._manifest.each:
            if manifest.tail and self.info.finished_ns is not None:
                tail = f"the last {manifest.tail} bytes are half a line and are skipped"
                self._problems.append(safe(f"{manifest.path}: {tail}"))
        self._problems += self._manifest.check_shards(self._shards.problem)
        for cached in ("records", "modules", "_by_module", "_seat_table", "_scattered"):
            self.__dict__.pop(cached, None)
        now = self._manifest.part_count
        return now - before if now >= before else now

    def get(
        self,
        module: str,
        *,
        kind: str = "forward",
        step: int | None = None,
        micro: int | None = None,
        call: int | None = None,
        path: str | None = None,
        train: bool | None = None,
        model: int | None = None,
        repeat: int | None = None,
        rank: int | None = None,
    ) -> Any:
        """The whole tensor of the one record that these fields mean; with `rank`, that rank's part of it.

        A field may be left out where there is one value of it. `module` is '' or '(root)' for the model itself.
        Returns what `Record.tensor()` returns: a torch.Tensor if torch is installed, else a numpy array.

        NotCapturedError (a KeyError) if there is no such record or more than one: it names what is there.
        """
        module, candidates = self._find(module)
        wanted = {
            "kind": kind, "model": model, "train": train, "step": step, "micro": micro,
            "call": call, "path": path, "repeat": repeat,
        }  # fmt: skip
        identity = _select.one(module, candidates, self._manifest.refused, wanted)
        record = self._record(identity)
        return record.tensor() if rank is None else record.part(rank)

    def __getitem__(self, module: str) -> list[Record]:
        """Every record of `module`, in order of step, microbatch and call. NotCapturedError (a KeyError) if none."""
        _, identities = self._find(module)
        return [self._record(i) for i in sorted(identities, key=_order)]

    def __contains__(self, module: object) -> bool:
        return (module if module != "(root)" else "") in self._by_module

    def __iter__(self) -> Iterator[str]:
        return iter(self.modules)

    def __len__(self) -> int:
        return len(self.modules)

    @cached_property
    def modules(self) -> list[str]:
        """Names of the modules (of parameters, for kinds param and grad) that have records, in the model's order."""
        position: dict[str, int] = {}
        for model in self.info.models:
            for info in model.modules:
                position.setdefault(info.name, len(position))

        def place(name: str) -> tuple[int, list[Any]]:
            owner = name
            for _ in range(DEPTH):
                if not owner or owner in position:
                    break
                owner = owner.rpartition(".")[0]
            return position.get(owner, -1), _select.natural(name)

        return sorted(self._by_module, key=place)

    @cached_property
    def records(self) -> list[Record]:
        """Every record, in order of step, microbatch, module, call."""
        position = {name: i for i, name in enumerate(self.modules)}
        identities = sorted(
            self._manifest.parts, key=lambda i: (i.step, i.micro, position[i.module], *_order(i))
        )
        with uncollected():
            return [self._record(i) for i in identities]

    @property
    def models(self) -> tuple[ModelInfo, ...]:
        """The job's models and the modules they have, captured or not."""
        return self.info.models

    @property
    def notices(self) -> tuple[str, ...]:
        """What the job said that should be read once, such as a selector without match."""
        return self.info.notices

    @property
    def refused(self) -> list[Refusal]:
        """Tensors that were not captured, and why."""
        return list(self._manifest.refused)

    @property
    def divergences(self) -> list[Divergence]:
        """Replicas that should be equal and are not."""
        return list(self._manifest.divergences)

    @property
    def dropped(self) -> list[Dropped]:
        """Parts that were lost, by rank."""
        return list(self._manifest.dropped)

    @property
    def problems(self) -> list[str]:
        """Damage that was found on opening: unreadable lines of the manifest, missing or short shards."""
        return [*self._problems, *self._manifest.problems]

    def __repr__(self) -> str:
        records, modules = len(self._manifest.parts), len(self._by_module)
        state = "" if self.info.finished_ns is not None else ", not finished"
        damage = f", {len(self.problems)} problems" if self.problems else ""
        return f"<flexmodel.Run {safe(str(self.path))}: {records} records of {modules} modules{state}{damage}>"

    @cached_property
    def _by_module(self) -> dict[str, list[Identity]]:
        found: dict[str, list[Identity]] = {}
        for identity in self._manifest.parts:
            found.setdefault(identity.module, []).append(identity)
        return found

    def _find(self, module: str) -> tuple[str, list[Identity]]:
        module = "" if module == "(root)" else module
        if module not in self._by_module:
            raise _select.unknown_module(module, self.modules, self.models, self._manifest.refused)
        return module, self._by_module[module]

    def _record(self, identity: Identity) -> Record:
        parts = self._scattered.settled(identity, _assemble.lent(self._manifest.parts[identity]))
        return _record.make(identity, parts, self._source)

    @cached_property
    def _scattered(self) -> Scattered:
        return Scattered(self.info.owners, self.info.world)

    def _seats(self) -> dict[Coordinates, int]:
        return self._seat_table

    @cached_property
    def _seat_table(self) -> dict[Coordinates, int]:
        table: dict[Coordinates, int] = {}
        for parts in self._manifest.parts.values():
            for part in parts:
                for coordinates in _prefixes(part):
                    table.setdefault(coordinates, part.rank)
        return table

    def _read_info(self) -> list[str]:
        """Reads run.json, of every node where there are several; what is wrong with it."""
        problems: list[str] = []
        if not self.nodes:
            self.info = _info_of(self.path, problems) or self.info
            return problems
        infos = [(node, _info_of(self.path / node, problems) or RunInfo()) for node in self.nodes]
        _nodes.expect_one_job(self.path, infos)
        self.info = _nodes.joined([info for _, info in infos])
        return problems


def _info_of(folder: Path, problems: list[str]) -> RunInfo | None:
    """What a folder's run.json says; None, and a problem more, if it cannot be read."""
    file = folder / RUN_FILE
    try:
        data = read_whole(file, RUN_FILE_BYTES)
        version = _info.version(data)
        info = _info.parse(data) if version <= FORMAT else None
    except FileNotFoundError:
        problems.append(f"{file} is missing")
        return None
    except Exception as error:  # whatever is wrong with it, the records may be fine
        problems.append(f"{file} cannot be read ({clip(reason(error))})")
        return None
    if info is None:
        raise RunError(f"{folder} has format {version}, this flexmodel reads up to {FORMAT}: get a newer one")
    return info


def _prefixes(part: Part) -> Iterator[Coordinates]:
    """The coordinates under which a part may be named as missing: those up to each axis, without replicas."""
    so_far: Coordinates = ()
    for axis in part.axes:
        if axis.place != "replicate":
            so_far = (*so_far, (axis.name, axis.index, axis.size))
            yield so_far


def _order(i: Identity) -> tuple[Any, ...]:
    return i.step, i.micro, i.call, i.model, not i.train, KINDS.index(i.kind), _select.natural(i.path), i.repeat


def _expect_run(path: Path) -> list[str]:
    """Names of the nodes' runs in `path`, none for a run of one folder; the error that helps most if it is neither."""
    try:
        return _runs_at(path)
    except RunError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        raise RunError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _runs_at(path: Path) -> list[str]:
    if not path.exists():
        raise RunNotFoundError(f"there is no run at {path}: pass the directory that `flexmodel run --out` was given")
    if not path.is_dir():
        instead = f"open its directory, {path.parent}" if _nodes.is_run(path.parent) else "pass the directory of a run"
        raise RunError(f"{path} is a file: {instead}")
    if _nodes.is_run(path):
        return []
    runs = _nodes.inside(path)
    if len(runs) > 1:
        return runs
    if runs:
        raise RunError(f"{path} is not a run but holds one: open {runs[0]} in it")
    empty = "is empty" if not any(path.iterdir()) else f"is not a run (it has neither {RUN_FILE} nor {MANIFEST_FILE})"
    raise RunError(f"{path} {empty}: pass the directory that `flexmodel run --out` was given")
