"""DistributedDataParallel over tensors with as many rows as a rank has sequences, which are no rows of its batch."""

import parallel
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

ROWS, LENGTH, WIDTH = 4, 5, 8


class Table(nn.Module):
    """A row for each head."""

    def __init__(self):
        super().__init__()
        self.rows = nn.Parameter(torch.randn(ROWS, WIDTH))

    def forward(self):
        return self.rows.tanh()


class Tables(nn.Module):
    """Given [batch, LENGTH, WIDTH] and the sequences' lengths."""

    def __init__(self):
        super().__init__()
        self.table = Table()
        self.normed = weight_norm(nn.Linear(WIDTH, ROWS))
        self.rnn = nn.LSTM(WIDTH, WIDTH, batch_first=True)
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x, lengths):
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        y, _ = pad_packed_sequence(self.rnn(packed)[0], batch_first=True, total_length=LENGTH)
        return self.head(y + self.normed(y) @ self.table())


def build() -> Tables:
    torch.manual_seed(0)
    return Tables()


def batch(step: int, sizes: list[int], rank: int):
    """Rank `rank`'s rows of batch number `step`. Every sequence of the first rank is full."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(sum(sizes), LENGTH, WIDTH, generator=generator)
    lengths = torch.tensor([LENGTH] * ROWS + [3, LENGTH, 1, 2])
    return x.split(sizes)[rank], lengths.split(sizes)[rank]


def loss_of(output):
    return output.square().mean()


def main() -> None:
    model = DistributedDataParallel(build())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    for step in range(2):
        loss = loss_of(model(*batch(step, [ROWS, ROWS], rank)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        parallel.report(step, loss, world)


if __name__ == "__main__":
    parallel.launch(main)
