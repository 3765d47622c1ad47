"""How the parts of a record make the whole: a plan from layouts alone, then the bytes.

The first mesh axis is the outermost. Replicas are one tensor and must look alike; then, axis by axis, the members'
pieces are joined on the sharded dimension, or added. `agent/run/src/read/layout.rs` says the same in Rust.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from ._dtypes import SIZES, Bytes, add
from ._errors import RunError
from ._limits import BYTES, NAMED
from ._shards import Shards, room
from ._types import Axis, Part, Stats

Coordinates = tuple[tuple[str, int, int], ...]  # (axis, index, size) of each axis


class Leaf(NamedTuple):
    """One part as it is."""

    part: Part
    shape: tuple[int, ...]


class Concat(NamedTuple):
    """Children one after the other on `dim`."""

    dim: int
    children: tuple[Node, ...]
    shape: tuple[int, ...]


class HeadTail(NamedTuple):
    """First halves of the children on `dim` in order, then their second halves in the opposite order."""

    dim: int
    children: tuple[Node, ...]
    shape: tuple[int, ...]


class Flat(NamedTuple):
    """The elements of a vector in another shape."""

    child: Node
    shape: tuple[int, ...]


class Sum(NamedTuple):
    """The sum of children of one shape."""

    children: tuple[Node, ...]
    shape: tuple[int, ...]


Node: TypeAlias = Leaf | Concat | HeadTail | Flat | Sum


class IncompleteError(Exception):
    """Members that have no part; not damage."""

    def __init__(self, missing: list[Coordinates]) -> None:
        super().__init__(missing)
        self.missing = missing


class ApartError(Exception):
    """The parts make no whole, for the reason given; each can be read by itself."""


def plan(parts: Sequence[Part]) -> Node:
    """How `parts` (at least one) make the whole; IncompleteError or ApartError where they do not."""
    first = parts[0]
    if len(parts) == 1 and all(a.place == "replicate" or (a.size == 1 and a.place != "flat") for a in first.axes):
        return Leaf(first, first.shape)
    parts = _settled(parts)
    first = parts[0]
    look = [(a.name, a.size, a.place, a.dim, a.shape) for a in first.axes]
    for part in parts:
        if part.dtype != first.dtype:
            raise ApartError(f"rank {first.rank} has {first.dtype} and rank {part.rank} has {part.dtype}")
        if [(a.name, a.size, a.place, a.dim, a.shape) for a in part.axes] != look:
            raise ApartError(f"ranks {first.rank} and {part.rank} describe different layouts")
    for depth in range(len(first.axes)):
        if _are_given_the_same(parts, depth):
            parts = [_placed(p, depth, "unknown") for p in parts]
    return _join(_unique(parts), 0)


def of_one_rank(parts: Sequence[Part]) -> list[Part]:
    """The parts of one rank as they lie among themselves: along the axes of which it is more than one member."""
    shared = [len({p.axes[i].index for p in parts}) > 1 for i in range(len(parts[0].axes))]
    return [p._replace(axes=tuple([a for a, keep in zip(p.axes, shared, strict=True) if keep])) for p in parts]


def _settled(parts: Sequence[Part]) -> Sequence[Part]:
    """Where a part had a batch of one and could not tell, another part's word for a shard of that dimension counts."""
    for depth in range(len(parts[0].axes)):
        said = [p.axes[depth] for p in parts if depth < len(p.axes)]
        dims = {a.dim for a in said if a.place == "shard"} & {a.dim for a in said if a.place == "replicate_or_shard"}
        if dims:
            parts = [_sharded(p, depth, dims) for p in parts]
    return parts


def _sharded(part: Part, depth: int, dims: set[int]) -> Part:
    ambiguous = depth < len(part.axes) and part.axes[depth].place == "replicate_or_shard"
    return _placed(part, depth, "shard") if ambiguous and part.axes[depth].dim in dims else part


def _placed(part: Part, depth: int, place: str) -> Part:
    axes = list(part.axes)
    axes[depth] = dataclasses.replace(axes[depth], place=place)
    return part._replace(axes=tuple(axes))


def _are_given_the_same(parts: Sequence[Part], depth: int) -> bool:
    """Whether two members along an axis were given the same, so that they have no rows of the batch of their own."""
    axes = (p.axes[depth] for p in parts if depth < len(p.axes))
    given = {a.index: a.given for a in axes if a.given is not None}
    return len(set(given.values())) < len(given)


def data_size(parts: Sequence[Part]) -> int:
    """Over how many ranks the batch lies, times the microbatches that a pipeline cuts a rank's rows into."""
    micro = next((axis.size for axis in parts[0].axes if axis.name == "micro"), 1)
    return micro * (1 if any(_are_given_the_same(parts, d) for d in range(len(parts[0].axes))) else parts[0].dp_size)


def _unique(parts: Sequence[Part]) -> list[Part]:
    """One part of every set of replicas, in mesh order."""
    kept: dict[tuple[int, ...], Part] = {}
    for part in sorted(parts, key=lambda p: ([a.index for a in p.axes], p.rank)):
        place = tuple([a.index for a in part.axes if a.place != "replicate"])
        other = kept.setdefault(place, part)
        if other is not part and not alike(part, other):
            replicas = any(a.place == "replicate" for a in part.axes)
            why = "hold replicas that differ" if replicas else "differ, and the layout does not tell them apart"
            raise ApartError(f"ranks {other.rank} and {part.rank} {why}")
    return list(kept.values())


def alike(a: Part, b: Part) -> bool:
    """Whether two parts hold the same bytes, by their checksums (by their statistics where bytes were not kept)."""
    if a.shape != b.shape:
        return False
    return a.raw_stats == b.raw_stats if a.crc is None or b.crc is None else a.crc == b.crc


def lent(parts: list[Part]) -> list[Part]:
    """`parts`; those of which another rank sent the bytes, and their own a checksum, have the place of these bytes."""
    if all(part.at or part.same is None for part in parts):
        return parts
    lenders: dict[tuple[Any, ...], Part] = {}
    for part in parts:
        if part.at:
            lenders.setdefault((part.dtype, part.shape, part.at.crc), part)

    def lend(part: Part) -> Part:
        if part.at or part.same is None:
            return part
        found = lenders.get((part.dtype, part.shape, part.same), part)
        return part._replace(at=found.at, raw_stats=found.raw_stats)

    return [lend(part) for part in parts]


def _join(parts: list[Part], depth: int) -> Node:
    axes = parts[0].axes
    while depth < len(axes) and axes[depth].place == "replicate":
        depth += 1
    if depth == len(axes):
        return Leaf(parts[0], parts[0].shape)
    axis = axes[depth]
    members: dict[int, list[Part]] = {}
    for part in parts:
        members.setdefault(part.axes[depth].index, []).append(part)
    missing: list[Coordinates] = []
    if len(members) < axis.size:
        absent = [i for i in range(min(axis.size, len(parts) + NAMED)) if i not in members]
        before = tuple((a.name, a.index, a.size) for a in axes[:depth] if a.place != "replicate")
        missing = [(*before, (axis.name, i, axis.size)) for i in absent[:NAMED]]
    children: list[Node] = []
    for group in members.values():  # in mesh order, as `parts` are
        try:
            children.append(_join(group, depth + 1))
        except IncompleteError as error:
            missing += error.missing[: NAMED - len(missing)]
    if missing:
        raise IncompleteError(missing)
    if axis.place == "flat":
        return _flat(children, axis)
    if len(children) == 1:
        return children[0]
    if axis.place == "shard":
        return _concat(axis.dim, children, axis.name)
    if axis.place == "head_tail":
        return _head_tail(axis.dim, children, axis.name)
    if axis.place == "replicate_or_shard":
        return children[0] if _all_alike([*members.values()]) else _concat(axis.dim, children, axis.name)
    if axis.place == "partial":
        if any(c.shape != children[0].shape for c in children):
            raise ApartError(f"the addends along {axis.name} differ in shape")
        return Sum(tuple(children), children[0].shape)
    if axis.place == "unknown":
        if _all_alike([*members.values()]):
            return children[0]
        raise ApartError(f"how they lie along {axis.name} is not known")
    raise ApartError(f"{axis.place!r} along {axis.name} is no layout that this flexmodel knows")


def _all_alike(groups: list[list[Part]]) -> bool:
    """Whether every group has what the first has, part by part, in order of their coordinates on further axes."""
    first = groups[0]
    return all(len(group) == len(first) and all(map(alike, group, first)) for group in groups)


def _flat(children: list[Node], axis: Axis) -> Node:
    vector = _concat(0, children, axis.name)
    shape = axis.shape or ()
    if len(vector.shape) != 1 or math.prod(vector.shape) != math.prod(shape):
        raise ApartError(f"runs of {vector.shape} elements along {axis.name} do not make {shape}")
    return Flat(vector, shape)


def _head_tail(dim: int, children: list[Node], axis: str) -> Node:
    whole = _concat(dim, children, axis)
    shape = children[0].shape
    if shape[dim] % 2 or any(child.shape != shape for child in children):
        raise ApartError(f"pieces of {shape} along {axis} have no halves of one length")
    return HeadTail(dim, tuple(children), whole.shape)


def _concat(dim: int, children: list[Node], axis: str) -> Node:
    shape = children[0].shape
    for child in children:
        other = child.shape
        fits = len(other) == len(shape) > dim and all(other[d] == shape[d] for d in range(len(shape)) if d != dim)
        if not fits:
            raise ApartError(f"shapes {shape} and {other} do not go together on dimension {dim} along {axis}")
    whole = (*shape[:dim], sum(c.shape[dim] for c in children), *shape[dim + 1 :])
    if math.prod([d or 1 for d in whole]) > BYTES:
        raise ApartError(f"pieces along {axis} make the shape {whole}, which is that of no tensor")
    return Concat(dim, tuple(children), whole)


def read(node: Node, dtype: str, shards: Shards) -> Bytes:
    """The bytes of `node`, row-major: one mapping where they lie in one piece, else a copy put together."""
    nbytes = math.prod(node.shape) * SIZES[dtype]
    if not nbytes:
        return np.empty(0, np.uint8)
    piece = _one_piece(node, dtype)
    if piece:
        return shards.read(*piece)
    _expect_apart(node, dtype)
    out = room((*node.shape, SIZES[dtype]))
    _fill(node, dtype, shards, out)
    return out.reshape(-1)


def _one_piece(node: Node, dtype: str) -> tuple[str, int, int] | None:
    """(shard, offset, bytes) of a node whose bytes lie side by side in one shard."""
    if isinstance(node, Leaf):
        return _location(node.part, dtype)
    if isinstance(node, Sum | HeadTail):
        return None
    if isinstance(node, Flat):
        return _one_piece(node.child, dtype)
    if math.prod(node.shape[: node.dim]) != 1:
        return None
    pieces = [_one_piece(c, dtype) for c in node.children if math.prod(c.shape)]
    shard, start, end = None, 0, 0
    for piece in pieces:
        if piece is None or (shard is not None and (piece[0] != shard or piece[1] != end)):
            return None
        if shard is None:
            shard, start = piece[0], piece[1]
        end = piece[1] + piece[2]
    return None if shard is None else (shard, start, end - start)


def _expect_apart(node: Node, dtype: str) -> None:
    """RunError where two pieces lie in the same bytes: a small file would make a whole of any size."""
    last = ("", 0, 0)
    for piece in sorted(_locations(node, dtype)):
        shard, offset, _ = piece
        if shard == last[0] and offset < last[1] + last[2]:
            raise RunError(f"two of its pieces have the byte {offset} of {shard}")
        last = piece


def _locations(node: Node, dtype: str) -> Iterator[tuple[str, int, int]]:
    if isinstance(node, Leaf):
        piece = _location(node.part, dtype)
        if piece[2]:
            yield piece
        return
    for child in (node.child,) if isinstance(node, Flat) else node.children:
        yield from _locations(child, dtype)


def _location(part: Part, dtype: str) -> tuple[str, int, int]:
    if part.at is None:
        if part.same is not None:
            raise ApartError(f"rank {part.rank} sent a checksum, and no rank bytes that have it")
        raise ApartError("only statistics were kept (reduce=stats)")
    if part.at.nbytes != math.prod(part.shape) * SIZES[dtype]:
        raise RunError(
            f"the manifest gives {part.at.nbytes} bytes to a {dtype} tensor of shape {part.shape} from rank {part.rank}"
        )
    return part.at.shard, part.at.offset, part.at.nbytes


def _fill(node: Node, dtype: str, shards: Shards, out: Bytes) -> None:
    """Writes the bytes of `node` to `out`, whose shape is the node's and one more dimension for an element's bytes."""
    if isinstance(node, Leaf):
        shard, offset, nbytes = _location(node.part, dtype)
        if nbytes:
            out[...] = shards.read(shard, offset, nbytes).reshape(out.shape)
    elif isinstance(node, Concat):
        start = 0
        for child in node.children:
            end = start + child.shape[node.dim]
            _fill(child, dtype, shards, out[(slice(None),) * node.dim + (slice(start, end),)])
            start = end
    elif isinstance(node, HeadTail):
        ahead, half = (slice(None),) * node.dim, node.children[0].shape[node.dim] // 2
        for i, child in enumerate(node.children):
            piece = read(child, dtype, shards).reshape(*child.shape, out.shape[-1])
            out[(*ahead, slice(i * half, (i + 1) * half))] = piece[(*ahead, slice(half))]
            end = node.shape[node.dim] - i * half
            out[(*ahead, slice(end - half, end))] = piece[(*ahead, slice(half, None))]
    elif isinstance(node, Flat):
        out[...] = read(node.child, dtype, shards).reshape(out.shape)
    else:
        out[...] = add(dtype, (read(child, dtype, shards) for child in node.children)).reshape(out.shape)


def whole_stats(node: Node) -> Stats | None:
    """Statistics of the whole from those of the parts; None for sums and for dtypes without."""
    if isinstance(node, Leaf):
        return node.part.stats
    if isinstance(node, Sum):
        return None
    if isinstance(node, Flat):
        return whole_stats(node.child)
    parts = [whole_stats(c) for c in node.children]
    known = [s for s in parts if s is not None]
    return pool(known) if len(known) == len(parts) else None


def pool(parts: Sequence[Stats]) -> Stats:
    """Statistics of several tensors' elements taken together."""
    finite = [s.count - s.nan - s.inf for s in parts]
    total = sum(finite)
    mean = std = None
    pairs = zip(finite, parts, strict=True)
    known = [(n, s.mean, s.std) for n, s in pairs if n and s.mean is not None and s.std is not None]
    if known and len(known) == sum(n > 0 for n in finite):
        mean = sum(n / total * m for n, m, _ in known)
        std = math.sqrt(sum(n / total * (d * d + (m - mean) * (m - mean)) for n, m, d in known))
    l2 = [s.l2 for s in parts if s.l2 is not None]
    return Stats(
        count=sum(s.count for s in parts),
        mean=mean,
        std=std,
        l2=math.hypot(*l2) if l2 else None,
        absmax=max((s.absmax for s in parts if s.absmax is not None), default=None),
        min=min((s.min for s in parts if s.min is not None), default=None),
        max=max((s.max for s in parts if s.max is not None), default=None),
        nan=sum(s.nan for s in parts),
        inf=sum(s.inf for s in parts),
        zero=sum(s.zero for s in parts),
    )
