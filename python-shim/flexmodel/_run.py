"""A run directory, opened for reading."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, overload

from . import _native, _record
from ._native import safe
from ._record import Record
from ._types import Divergence, Dropped, Identity, Job, ModelInfo, Refusal, Revision, RunInfo, jobs, revisions, run_info


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
        self._reader = _native.Run(self.path)

    def refresh(self) -> int:
        """Reads what a running job has written since; returns how many parts are new."""
        new = self._reader.refresh()
        for cached in ("info", "records", "modules"):
            self.__dict__.pop(cached, None)
        return new

    @property
    def nodes(self) -> list[str]:
        """Folders of the nodes' runs, where it is several; else empty."""
        return self._reader.nodes

    @cached_property
    def info(self) -> RunInfo:
        """What was run, by what, and how it ended."""
        return run_info(json.loads(self._reader.info()))

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
        apart: int | None = None,
        again: int | None = None,
        job: int | None = None,
        attempt: int | None = None,
        rank: int | None = None,
        pad: complex | None = None,
        side: str = "right",
        nested: bool = False,
    ) -> Any:
        """The whole tensor of the one record that these fields mean; with `rank`, that rank's part of it.

        A field may be left out where there is one value of it. `module` is '' or '(root)' for the model itself.
        Without `job` it is the newest job that has the module, and without `attempt` the last attempt of that job:
        steps of earlier ones are never mixed in. Without `apart` a pass of all ranks is meant, if there is one
        (`Record.apart`). `again` tells apart what is called the same; the first is 0.
        Returns what `Record.tensor()` returns: a torch.Tensor if torch is installed, else a numpy array. Where each
        rank padded its rows to its own longest, `pad=0` fills the shorter ones up on that `side`, and `nested=True`
        gives a nested tensor; see there.

        NotCapturedError (a KeyError) if there is no such record or more than one: it names what is there.
        """
        reader = self._reader.one(
            _name(module), job=job, attempt=attempt, kind=kind, model=model, train=train, step=step, micro=micro,
            call=call, path=path, repeat=repeat, apart=apart, again=again,
        )  # fmt: skip
        record = _record.make(reader)
        how = {"pad": pad, "side": side, "nested": nested}
        return record.tensor(**how) if rank is None else record.part(rank, **how)

    def __getitem__(self, module: str) -> list[Record]:
        """Every record of `module`, of all jobs, in order of job, step, microbatch and call.

        NotCapturedError (a KeyError) if there is none.
        """
        return [_record.make(reader) for reader in self._reader.of_module(_name(module))]

    def __contains__(self, module: object) -> bool:
        return self._reader.has(_name(module))

    def __iter__(self) -> Iterator[str]:
        return iter(self.modules)

    def __len__(self) -> int:
        return len(self.modules)

    @cached_property
    def modules(self) -> list[str]:
        """Names of the modules (of parameters, for kinds param and grad) that have records, in the model's order."""
        return self._reader.modules()

    @cached_property
    def records(self) -> Sequence[Record]:
        """Every record of all jobs, in order of job, step, microbatch, module, call; made when it is looked at."""
        return _Records(self._reader.records())

    @property
    def jobs(self) -> list[Job]:
        """The jobs that wrote into this run, in turn or at once, and the attempts of each, in order."""
        return jobs(self._reader.jobs())

    @property
    def revisions(self) -> list[Revision]:
        """Hooks that began while a job ran, in order; `Record.revision` says which of them a record is of."""
        return revisions(self._reader.revisions())

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
        return [Refusal(Identity(*what), rank, why) for what, rank, why in self._reader.refused()]

    @property
    def divergences(self) -> list[Divergence]:
        """Replicas that should be equal and are not."""
        return [Divergence(Identity(*what), rank, other) for what, rank, other in self._reader.divergences()]

    @property
    def dropped(self) -> list[Dropped]:
        """Parts that were lost, by rank."""
        return [Dropped(*raw) for raw in self._reader.dropped()]

    @property
    def problems(self) -> list[str]:
        """Damage that was found on opening: unreadable lines of the manifest, missing or short shards."""
        return self._reader.problems()

    def __repr__(self) -> str:
        records, modules = self._reader.record_count(), self._reader.module_count()
        state = "" if self.info.finished_ns is not None else ", not finished"
        damage = f", {len(self.problems)} problems" if self.problems else ""
        return f"<flexmodel.Run {safe(str(self.path))}: {records} records of {modules} modules{state}{damage}>"


class _Records(Sequence[Record]):
    """The records of a run as it was then."""

    def __init__(self, reader: _native.Records) -> None:
        self._reader = reader

    def __len__(self) -> int:
        return len(self._reader)

    @overload
    def __getitem__(self, index: int) -> Record: ...

    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...

    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [_record.make(self._reader.at(at)) for at in range(*index.indices(len(self)))]
        return _record.make(self._reader.at(range(len(self))[index]))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, list | _Records):
            return NotImplemented
        return len(self) == len(other) and all(one == another for one, another in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]  # as a list

    def __repr__(self) -> str:
        return repr(list(self))


def _name(module: Any) -> Any:
    return "" if module == "(root)" else module
