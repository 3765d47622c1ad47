"""DistributedDataParallel over modules that differ in where the batch is in their tensors: `orders.py LENGTH...`, a
model for each length of sequences."""

import parallel
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

WIDTH = 8


class Orders(nn.Module):
    """Given [length, batch, WIDTH]."""

    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, 2)
        self.rnn = nn.GRU(WIDTH, WIDTH, num_layers=3)
        self.turned = nn.GRU(WIDTH, WIDTH, num_layers=3, batch_first=True)
        self.encoder = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0)
        self.table = nn.Embedding(WIDTH, WIDTH)

    def forward(self, x):
        y, weights = self.attn(x, x, x)
        y, _ = self.rnn(y)
        y = self.encoder(y)
        y, _ = self.turned(y.transpose(0, 1))
        return y + self.table(torch.arange(y.size(1))), weights


def build() -> Orders:
    torch.manual_seed(0)
    return Orders()


def batch(step: int, length: int, sizes: list[int], rank: int):
    """Rank `rank`'s columns of batch number `step`."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(length, sum(sizes), WIDTH, generator=generator).split(sizes, 1)[rank].contiguous()


def loss_of(output):
    return output[0].square().mean() + output[1].square().mean()


STEPS = 2


def main(*lengths: int) -> None:
    for length in lengths:
        train(length)


def train(length: int) -> None:
    model = DistributedDataParallel(build())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    for step in range(STEPS):
        loss = loss_of(model(batch(step, length, [4, 4], rank)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        parallel.report(step, loss, world)


if __name__ == "__main__":
    import sys

    parallel.launch(main, *map(int, sys.argv[1:]))
