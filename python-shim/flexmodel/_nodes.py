"""Runs of several nodes, read as the one job that they are.

Every node's agent writes a run of its own, with the parts of its ranks. A folder that is no run and holds such runs
(`runs/x/node-a`, `runs/x/node-b`) is read as the run of the whole job: parts with the same identity are one record's,
whichever node they came from. A shard is then named with its node's folder (`node-a/shard-00000`).
`agent/run/src/read/nodes.rs` says the same in Rust.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ._assemble import alike
from ._errors import RunError
from ._limits import NODES
from ._manifest import Manifest
from ._text import clip
from ._types import Divergence, Dropped, Identity, ModelInfo, ModuleInfo, Part, Refusal, RunInfo, Totals

RUN_FILE = "run.json"
MANIFEST_FILE = "manifest.jsonl"


def is_run(path: Path) -> bool:
    """Whether a folder is a run itself."""
    return (path / RUN_FILE).exists() or (path / MANIFEST_FILE).exists()


def inside(path: Path) -> list[str]:
    """Names of the folders in `path` that are runs, in order."""
    names = sorted(itertools.islice((p.name for p in path.iterdir() if p.is_dir() and is_run(p)), NODES + 1))
    if len(names) > NODES:
        raise RunError(f"{path} is not a run and holds more than {NODES}: open one of them")
    return names


def expect_one_job(path: Path, infos: Sequence[tuple[str, RunInfo]]) -> None:
    """RunError where these are not the runs of one job's nodes. One that no rank has attached to (yet) says nothing."""
    known = [(name, info) for name, info in infos if info.world > 0]
    if not known:
        raise _refusal(path, "no rank has attached to any of them")
    first, a = known[0]
    if a.world < 2:
        raise _refusal(path, f"{first} is a run of one process")
    for name, b in known[1:]:
        for field, what in (("world", "a world of"), ("hooks", "the hooks"), ("torch", "torch"), ("python", "Python")):
            x, y = getattr(a, field), getattr(b, field)
            if x != y:
                raise _refusal(path, f"{first} has {what} {clip(str(x))} and {name} {clip(str(y))}")


def _refusal(path: Path, why: str) -> RunError:
    return RunError(f"{path} is not a run, and the runs in it are not the nodes of one job: {why}; open one of them")


def joined(infos: Sequence[RunInfo]) -> RunInfo:
    """What is true of the job."""
    attached = [i for i in infos if i.world > 0] or list(infos)
    ends = [i.finished_ns for i in infos if i.finished_ns is not None]
    codes = [i.exit_code for i in infos if i.exit_code is not None]
    models: dict[int, dict[str, ModuleInfo]] = {}
    for model in (m for i in infos for m in i.models):
        # A node of a pipeline may know a part of the model only.
        known = models.setdefault(model.model, {})
        for module in model.modules:
            known.setdefault(module.name, module)
    fields = [f.name for f in dataclasses.fields(Totals)]
    return dataclasses.replace(
        attached[0],
        command=next((i.command for i in infos if i.command), ()),
        started_ns=min((i.started_ns for i in infos if i.started_ns), default=0),
        finished_ns=max(ends) if len(ends) == len(infos) else None,
        exit_code=next((c for c in codes if c), codes[0] if codes else None),
        node=", ".join(dict.fromkeys(i.node for i in infos)),
        models=tuple(ModelInfo(model, tuple(modules.values())) for model, modules in models.items()),
        owners=tuple(o for i in infos for o in i.owners),
        notices=tuple(dict.fromkeys(n for i in infos for n in i.notices)),
        totals=Totals(**{f: sum(getattr(i.totals, f) for i in infos) for f in fields}),
    )


class Manifests:
    """The manifests of several nodes, with what a `Manifest` tells of one."""

    def __init__(self, path: Path, nodes: Sequence[str]) -> None:
        self._path = path
        self.each = [Manifest(path / node / MANIFEST_FILE, f"{node}/") for node in nodes]
        self._nodes = nodes
        self.parts: dict[Identity, list[Part]] = {}
        self.divergences: list[Divergence] = []

    def refresh(self) -> None:
        """Reads the lines that are new, and joins what the nodes have of a record. RunError if two have one rank."""
        for manifest in self.each:
            manifest.refresh()
        owners: dict[int, str] = {}
        for node, manifest in zip(self._nodes, self.each, strict=True):
            for rank in manifest.ranks:
                if owners.setdefault(rank, node) != node:
                    raise _refusal(self._path, f"{owners[rank]} and {node} both have rank {rank}")
        self.parts = {}
        for manifest in self.each:
            for identity, parts in manifest.parts.items():
                others = self.parts.get(identity)
                self.parts[identity] = [*others, *parts] if others else parts
        self.divergences = [d for m in self.each for d in m.divergences]
        told = {(d.what, d.rank) for d in self.divergences}
        for identity, parts in self.parts.items():
            self.divergences += (d for d in _differing(identity, parts) if (d.what, d.rank) not in told)

    @property
    def refused(self) -> list[Refusal]:
        return [r for m in self.each for r in m.refused]

    @property
    def dropped(self) -> list[Dropped]:
        return [d for m in self.each for d in m.dropped]

    @property
    def problems(self) -> list[str]:
        return [p for m in self.each for p in m.problems]

    @property
    def part_count(self) -> int:
        return sum(m.part_count for m in self.each)

    def check_shards(self, problem: Callable[[str, int], str | None]) -> list[str]:
        """What `problem` says of each shard that the manifests name."""
        return [text for m in self.each for text in m.check_shards(problem)]


def _differing(identity: Identity, parts: Sequence[Part]) -> Iterator[Divergence]:
    """No agent saw replicas of two nodes side by side: it is noticed here where they differ."""
    first: dict[tuple[int, ...], Part] = {}
    for part in sorted(parts, key=lambda p: p.rank):
        if any(a.size > 1 and a.place == "replicate" for a in part.axes):
            other = first.setdefault(tuple(a.index for a in part.axes if a.place != "replicate"), part)
            if other is not part and not alike(other, part):
                yield Divergence(identity, part.rank, other.rank)
