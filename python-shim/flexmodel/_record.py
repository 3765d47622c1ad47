"""A record: one captured tensor, put together from what the ranks wrote."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from . import _assemble
from ._assemble import ApartError, Coordinates, IncompleteError, Node
from ._dtypes import SIZES, as_numpy, as_torch, numpy_dtype, torch_or_none
from ._errors import NotCapturedError, RunError
from ._shards import Shards
from ._text import clip, few, safe
from ._types import Axis, Dropped, Identity, Part, Stats


@dataclass(frozen=True)
class Source:
    """What records need of their run."""

    shards: Shards
    seats: Callable[[], dict[Coordinates, int]]  # mesh coordinates to ranks, as far as parts tell them
    dropped: Callable[[], Sequence[Dropped]]


@dataclass(frozen=True)
class Record:
    """One captured tensor, as it was when its run was opened or last refreshed.

    `module` is the name in the model as it was written, empty for the model itself. `path` is the leaf: `out`,
    `out[0]`, `out.logits`, `in[0]`, `in.states`; a gradient has the path of the value it is the gradient of.
    `step` counts optimizer steps, `micro` the model's forward passes within a step, `call` the module's calls within a
    pass, `repeat` backward passes over the same forward.

    `shape` is the whole tensor's, or None where the parts make no whole (yet); `dtype` is torch's name of it;
    `nbytes` is the whole's size in memory, or that of the parts where there is no whole. `complete` says whether
    `tensor()` has all that it needs; a record of statistics only (`reduce=stats`) is not. `layout` is that of the first
    part, and `ranks` are those whose part is there. An activation's gradient is as the job computes it: of a mean loss
    over equal shards, or a pipeline's equal microbatches, `dp_size` times that of one process, and `loss_scale` times
    that of the loss that the script computed, where a GradScaler or DeepSpeed scaled it. A scale that the job let grow
    or fall too far is `inf` or 0, and one that it broke `nan`.
    """

    module: str
    kind: str
    path: str
    step: int
    micro: int
    call: int
    train: bool
    shape: tuple[int, ...] | None
    dtype: str
    model: int
    repeat: int
    class_name: str
    group: str
    layout: tuple[Axis, ...]
    dp_size: int
    loss_scale: float
    time_ns: int
    ranks: tuple[int, ...]
    nbytes: int
    complete: bool

    # Not fields: they follow from the parts, and few records are asked for them.
    @cached_property
    def stats(self) -> Stats | None:
        """Statistics of the whole; None for dtypes without, for sums of partials, and where there is no whole."""
        try:
            return _assemble.whole_stats(_assemble.plan(self.parts))
        except (IncompleteError, ApartError):
            return None

    @property
    def parts(self) -> tuple[Part, ...]:
        """What each rank captured, in rank order."""
        parts: tuple[Part, ...] = self.__dict__["_parts"]
        return parts

    def tensor(self) -> Any:
        """The whole tensor: a torch.Tensor of `shape` and `dtype` if torch is installed, else a numpy array.

        It is the caller's own: writing to it changes neither the run nor another call's result. Where its bytes lie in
        one piece it is mapped, not copied. Bytes are not checked against their crc; `flexmodel verify` does that.

        NotCapturedError (a KeyError) where ranks are missing or the parts make no whole; RunError where the run is
        damaged; TypeError for a dtype that numpy lacks when neither torch nor ml_dtypes is installed.
        """
        return self._make(self._plan(self.parts), torch_or_none())

    def numpy(self) -> Any:
        """As `tensor()`, always as a numpy array; torch is not imported. bfloat16 and float8 need ml_dtypes."""
        return self._make(self._plan(self.parts), None)

    def part(self, rank: int) -> Any:
        """What `rank` alone captured, as `tensor()` gives it: the microbatches of a pipeline laid side by side.

        NotCapturedError if its part is not stored.
        """
        own = [part for part in self.parts if part.rank == rank]
        if own:
            return self._make(self._plan(_assemble.of_one_rank(own)), torch_or_none())
        stored = few(self.ranks)
        raise NotCapturedError(f"{self} has no part of rank {rank}, only of {stored}")

    def __str__(self) -> str:
        name = safe(f"{clip(self.module) or '(root)'} {self.kind} {clip(self.path)}".rstrip())
        where = f"step {self.step} micro {self.micro} call {self.call}"
        marks = [f"model {self.model}"] if self.model else []
        marks += [f"repeat {self.repeat}"] if self.repeat else []
        marks += ["eval"] if not self.train else []
        return " ".join([name, where, *marks])

    def __repr__(self) -> str:
        shape = "shape unknown" if self.shape is None else f"{self.dtype}{list(self.shape)}"
        missing = "" if self.complete else ", incomplete" if self.shape is None else ", statistics only"
        return f"<Record {self}: {shape}{missing}>"

    def _make(self, node: Node, torch: Any) -> Any:
        if torch is None:
            numpy_dtype(self.dtype)  # before bytes are moved for nothing
        try:
            raw = _assemble.read(node, self.dtype, self._source.shards)
        except ApartError as error:
            raise NotCapturedError(f"{self}: {error}") from None
        except RunError as error:
            raise RunError(f"{self}: {error}") from None
        except MemoryError:
            raise RunError(f"{self}: there is no memory for it") from None
        try:
            if torch is None:
                return as_numpy(raw, self.dtype, node.shape)
            return as_torch(torch, raw, self.dtype, node.shape)
        except (ValueError, RuntimeError, OverflowError) as error:  # more dimensions than they have
            raise RunError(f"{self}: {error}") from None

    def _plan(self, parts: Sequence[Part]) -> Node:
        try:
            return _assemble.plan(parts)
        except IncompleteError as error:
            raise NotCapturedError(self._incomplete(error.missing)) from None
        except ApartError as error:
            ranks = few(self.ranks)
            raise NotCapturedError(f"{self}: {error}; each rank's part is kept: ask for rank= one of {ranks}") from None

    def _incomplete(self, missing: list[Coordinates]) -> str:
        seats = self._source.seats()
        names: list[str] = []
        ranks: list[int] = []
        for place in missing:
            rank = seats.get(place)
            ranks += [] if rank is None else [rank]
            text = clip(", ".join(f"{axis} {index} of {size}" for axis, index, size in place))
            names.append(text if rank is None else f"rank {rank} ({text})")
        lost = {d.reason for d in self._source.dropped() if d.rank in ranks}
        why = f"; parts were dropped there: {clip(', '.join(sorted(lost)))}" if lost else ""
        has = few(self.ranks)
        return (
            f"{self} is incomplete: no part of {'; '.join(names)}{why}. Parts of rank {has} are there: ask with rank=; "
            f"while the job runs, run.refresh() reads what has come since"
        )

    @property
    def _source(self) -> Source:
        source: Source = self.__dict__["_home"]
        return source


def make(identity: Identity, parts: Sequence[Part], source: Source) -> Record:
    """The record of `parts`, which share `identity`; at least one."""
    ordered = tuple(sorted(parts, key=lambda p: p.seat))
    first = ordered[0]
    shape: tuple[int, ...] | None = None
    with contextlib.suppress(IncompleteError, ApartError):
        shape = _assemble.plan(ordered).shape
    record = Record(
        module=identity.module, kind=identity.kind, path=identity.path, step=identity.step, micro=identity.micro,
        call=identity.call, train=identity.train, shape=shape, dtype=first.dtype, model=identity.model,
        repeat=identity.repeat, class_name=first.class_name, group=first.group,
        layout=first.axes, dp_size=_assemble.data_size(ordered),
        loss_scale=first.loss_scale, time_ns=min(p.time_ns for p in ordered),
        ranks=tuple(sorted({p.rank for p in ordered})),
        nbytes=sum(p.nbytes for p in ordered) if shape is None else math.prod(shape) * SIZES[first.dtype],
        complete=shape is not None and all(p.at for p in ordered),
    )  # fmt: skip
    record.__dict__["_parts"] = ordered
    record.__dict__["_home"] = source
    return record
