"""Context parallel on two ranks, with ring attention: `context_parallel.py ORDER...`, one by one.

zigzag      torch's context_parallel shards the batch: a rank has a piece from the sequence's head and one from its tail
plain       the same without that balance: a rank has one piece
sharded     torch gives the pieces of `zigzag` as other tensors
contiguous  the script takes its piece of the sequence itself

torch's own ring attention has no CPU kernel, so that the model brings one.
"""

import contextlib
import math
import sys

import parallel
import tiny
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.experimental._attention import (
    _context_parallel_shard,
    _cp_options,
    _HeadTailLoadBalancer,
)
from torch.nn.parallel import DistributedDataParallel

STEPS = 2
ROWS = 4


class Rotate(torch.autograd.Function):
    """Passes a tensor on to the next rank of the ring; its gradient goes back the same way."""

    @staticmethod
    def forward(ctx, x):
        return _pass(x, 1)

    @staticmethod
    def backward(ctx, grad):
        return _pass(grad, -1)


def _pass(x: torch.Tensor, by: int) -> torch.Tensor:
    rank, world = dist.get_rank(), dist.get_world_size()
    got = torch.empty_like(x)
    send = dist.P2POp(dist.isend, x.contiguous(), (rank + by) % world)
    receive = dist.P2POp(dist.irecv, got, (rank - by) % world)
    for work in dist.batch_isend_irecv([send, receive]):
        work.wait()
    return got


class Attention(tiny.Attention):
    """Sees the keys and values of the whole sequence, as they come around the ring."""

    def forward(self, x, positions):
        batch, seq, width = x.shape
        q, k, v = self.qkv(x).view(batch, seq, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        theirs, scores, values = (torch.stack((k, v)), positions), [], []
        for hop in range(dist.get_world_size()):
            theirs = theirs if hop == 0 else tuple(map(Rotate.apply, theirs))
            (key, value), at = theirs
            score = q @ key.transpose(-1, -2) / math.sqrt(width // self.heads)
            scores.append(score.masked_fill(at > positions[:, None], float("-inf")))
            values.append(value)
        weights = torch.cat(scores, -1).softmax(-1)
        return self.proj((weights @ torch.cat(values, 2)).transpose(1, 2).reshape(batch, seq, width))


class Block(tiny.Block):
    def __init__(self, width: int, heads: int):
        super().__init__(width, heads)
        self.attn = Attention(width, heads)

    def forward(self, x, positions):
        x = x + self.attn(self.norm1(x), positions)
        return x + self.mlp(self.norm2(x))


class Net(tiny.Net):
    def __init__(self):
        super().__init__()
        self.place = nn.Embedding(tiny.SEQ, tiny.WIDTH)
        self.layers = nn.ModuleList(Block(tiny.WIDTH, tiny.HEADS) for _ in self.layers)

    def forward(self, tokens, positions):
        x = self.embed(tokens) + self.place(positions)
        for layer in self.layers:
            x = layer(x, positions)
        return self.lm_head(self.norm(x))


def build() -> Net:
    """The model, which every rank has."""
    torch.manual_seed(0)
    return Net()


@contextlib.contextmanager
def shared(mesh: DeviceMesh, order: str, tokens, targets, positions):
    """This rank's part of the sequence."""
    buffers, dims = [tokens, targets, positions], [1, 1, 0]
    if order == "sharded":
        yield _context_parallel_shard(mesh, buffers, dims, _HeadTailLoadBalancer(tiny.SEQ, mesh.size(), "cpu"))
    elif order != "contiguous":
        _cp_options.enable_load_balance = order == "zigzag"
        with context_parallel(mesh, buffers=buffers, buffer_seq_dims=dims):
            yield buffers
    else:
        rank, world = mesh.get_local_rank(), mesh.size()
        yield tokens.chunk(world, 1)[rank], targets.chunk(world, 1)[rank], positions.chunk(world)[rank]


def train(order: str) -> None:
    names = ("cp",) if order == "contiguous" else None
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=names)
    model = DistributedDataParallel(build())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(STEPS):
        with shared(mesh, order, *tiny.batch(step, [ROWS], 0), torch.arange(tiny.SEQ)) as (tokens, targets, positions):
            loss = tiny.loss_of(model(tokens, positions), targets)
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        parallel.report(step, loss, mesh.size())


def main(*orders: str) -> None:
    for order in orders:
        train(order)


if __name__ == "__main__":
    parallel.launch(main, *sys.argv[1:])
