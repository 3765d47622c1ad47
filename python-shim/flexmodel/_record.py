"""A record: one captured tensor, put together from what the ranks wrote."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from . import _native
from ._dtypes import as_numpy, as_torch, numpy_dtype, torch_or_none
from ._errors import RunError
from ._native import clip, safe
from ._nested import nested_rows
from ._types import Axis, Part, Stats, layout, part


@dataclass(frozen=True)
class Record:
    """One captured tensor, as it was when its run was opened or last refreshed.

    `module` is the name in the model as it was written, empty for the model itself. `path` is the leaf: `out`,
    `out[0]`, `out.logits`, `in[0]`, `in.states`; a gradient has the path of the value it is the gradient of.
    `step` counts optimizer steps, `micro` the model's forward passes within a step, `call` the module's calls within a
    pass, `repeat` backward passes over the same forward. `job` and `attempt` say which of `Run.jobs` it is of; `again`
    is 0 but for what is called as another record is and was kept beside it. `revision` is that of the hooks that it was
    captured under: one of `Run.revisions`, or 0 for those that the job was started with.

    `shape` is the whole tensor's, or None where the parts make no whole (yet). Where each rank padded its rows to
    its own longest, `padded_shape` is that of `tensor(pad=...)`, and `shape` is None and `complete` False:
    `tensor()` alone is not told what shall fill up the shorter ones. Elsewhere `padded_shape` is None. `dtype` is
    torch's name of it; `slice` is what a `slice=` left of it, as `[:,-1]`, or None: then shape and values are those
    of the slice; `nbytes` is the whole's size in memory, or that of the parts where there is no whole. `complete`
    says whether `tensor()` has all that it needs, and `reason` why not; a record of statistics only
    (`reduce=stats`) is not. `layout` is that of the first part, and `ranks` are those whose part is there. An
    activation's gradient is as the job computes it: of a mean loss over equal shards, or a pipeline's equal
    microbatches, `dp_size` times that of one process, and `loss_scale` times that of the loss that the script
    computed, where a GradScaler or DeepSpeed scaled it. A scale that the job let grow or fall too far is `inf` or
    0, and one that it broke `nan`. Of a gradient that the optimizer did not use, since it was not finite, `skipped`
    is True. `train` tells passes that train from others: gradients were enabled when the model was called, and some
    module of it was in training mode.

    Parts are put together where the ranks are known to have made the pass together. One that not all ranks made is a
    record by itself, whole for those that did: `apart` is the lowest of these, and None of a pass of all. `assumed`
    says that nothing shows that the ranks' passes are one but that all made equally many. While that is not known yet,
    `pending` is True and there is no whole.
    """

    module: str
    kind: str
    path: str
    step: int
    micro: int
    call: int
    train: bool
    shape: tuple[int, ...] | None
    padded_shape: tuple[int, ...] | None
    dtype: str
    slice: str | None
    model: int
    repeat: int
    job: int
    attempt: int
    again: int
    revision: int
    class_name: str
    group: str
    layout: tuple[Axis, ...]
    dp_size: int
    loss_scale: float
    skipped: bool
    time_ns: int
    ranks: tuple[int, ...]
    nbytes: int
    complete: bool
    apart: int | None
    assumed: bool
    pending: bool

    # Not fields: they follow from the parts, and few records are asked for them.
    @cached_property
    def stats(self) -> Stats | None:
        """Statistics of the whole, without what `pad=` would fill up; None for dtypes without, for sums of partials,
        and where there is no whole.
        """
        raw = self._reader.stats()
        return None if raw is None else Stats(*raw)

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """What each rank captured, in rank order."""
        return tuple(map(part, json.loads(self._reader.parts())))

    @cached_property
    def reason(self) -> str | None:
        """Why `tensor()` has no whole to give, in a sentence that says what there is instead; None where `complete`."""
        return self._reader.reason(str(self))

    def tensor(self, *, pad: complex | None = None, side: str = "right", nested: bool = False) -> Any:
        """The whole tensor: a torch.Tensor of `shape` and `dtype` if torch is installed, else a numpy array.

        Where each rank padded its rows to its own longest, all rows are there in order once it is said what they shall
        look like. `pad`, a number that `dtype` has, fills up the shorter ones as far as the longest, on their `side`
        "right" or "left": the one on which the job pads, too. `nested` gives a torch nested tensor that has each row as
        long as it is on its rank; its layout is torch.jagged, or strided where several dimensions differ. `pad` changes
        nothing where rows are of one size.

        It is the caller's own: writing to it changes neither the run nor another call's result. Where its bytes lie in
        one piece it is mapped, not copied. Bytes are not checked against their crc; `flexmodel verify` does that.

        NotCapturedError (a KeyError) where ranks are missing or the parts make no whole; RunError where the run is
        damaged; ValueError for a `pad` that `dtype` has not; TypeError for a dtype that numpy lacks when neither torch
        nor ml_dtypes is installed, and for `nested` without torch.
        """
        return self._make(None, torch_or_none(), pad, side, nested)

    def numpy(self, *, pad: complex | None = None, side: str = "right") -> Any:
        """As `tensor()`, always as a numpy array; torch is not imported. bfloat16 and float8 need ml_dtypes."""
        return self._make(None, None, pad, side)

    def part(self, rank: int, *, pad: complex | None = None, side: str = "right", nested: bool = False) -> Any:
        """What `rank` alone captured, as `tensor()` gives it: the microbatches of a pipeline laid side by side.

        NotCapturedError if its part is not stored.
        """
        return self._make(rank, torch_or_none(), pad, side, nested)

    def __str__(self) -> str:
        name = safe(f"{clip(self.module) or '(root)'} {self.kind} {clip(self.path)}".rstrip())
        where = f"step {self.step} micro {self.micro} call {self.call}"
        numbered = {"job": self.job, "attempt": self.attempt, "model": self.model}
        marks = [f"{name} {number}" for name, number in numbered.items() if number]
        marks += [f"repeat {self.repeat}"] if self.repeat else []
        marks += ["eval"] if not self.train else []
        marks += [f"rank {self.apart} apart"] if self.apart is not None else []
        marks += [f"again {self.again}"] if self.again else []
        return " ".join([name, where, *marks])

    def __repr__(self) -> str:
        if self.padded_shape is not None:
            return f"<Record {self}: {self.dtype}, rows of several sizes, padded {list(self.padded_shape)}>"
        shape = "shape unknown" if self.shape is None else f"{self.dtype}{list(self.shape)}"
        missing = ", pending" if self.pending else ", incomplete" if self.shape is None else ", statistics only"
        missing = "" if self.complete else missing
        return f"<Record {self}: {shape}{missing}>"

    def _make(
        self, rank: int | None, torch: Any, pad: complex | None = None, side: str = "right", nested: bool = False
    ) -> Any:
        if nested:
            return self._nested(rank, torch, pad)
        if torch is None:
            numpy_dtype(self.dtype)  # before bytes are moved for nothing
        # What one rank captured may be of another type than the whole.
        return self._of_bytes(torch, self._reader.bytes(str(self), rank, pad, side))

    def _nested(self, rank: int | None, torch: Any, pad: complex | None) -> Any:
        if pad is not None:
            raise ValueError("pad= fills rows up, and nested=True leaves them as they are: give one of both")
        if torch is None:
            raise TypeError("nested=True gives a nested tensor of torch's, which is not installed: pad= needs no torch")
        return nested_rows(torch, [self._of_bytes(torch, of) for of in self._reader.pieces(str(self), rank)])

    def _of_bytes(self, torch: Any, of: tuple[_native.Memory, list[int], str]) -> Any:
        memory, dims, dtype = of
        raw, shape = np.asarray(memory), tuple(dims)
        try:
            if torch is None:
                return as_numpy(raw, dtype, shape)
            return as_torch(torch, raw, dtype, shape)
        except (ValueError, RuntimeError, OverflowError) as error:  # more dimensions than they have
            raise RunError(f"{self}: {error}") from None

    @property
    def _reader(self) -> _native.Record:
        reader: _native.Record = self.__dict__["_native"]
        return reader


def make(reader: _native.Record) -> Record:
    """The record that the reader has found."""
    record = object.__new__(Record)
    fields = reader.fields()
    fields["layout"] = layout(fields["layout"])
    # As the frozen class's own __init__ would, field by field.
    record.__dict__.update(fields, _native=reader)
    return record
