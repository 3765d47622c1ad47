"""Batches that the first size of the first tensor does not tell: `batches.py CASE...`, under DDP, one after another.

flat     one sequence a rank, whose tokens a router takes as rows
images   a list of images of different sizes
ragged   a dict of tensors with as many rows as a rank happens to have
"""

import sys

import parallel
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

STEPS, WIDTH = 2, 8


class Flat(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.position, self.gate = nn.Embedding(32, WIDTH), nn.Embedding(16, WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, tokens):
        x = self.embed(tokens) + self.position(torch.arange(tokens.size(1)))
        weight = self.gate(x.view(-1, WIDTH)).softmax(-1).amax(-1)
        return x * weight.view(*tokens.shape, 1)


class Images(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)

    def forward(self, images):
        batch = torch.zeros(len(images), 3, WIDTH, WIDTH)
        for row, image in zip(batch, images, strict=True):
            row[:, : image.size(1), : image.size(2)] = image
        return self.stem(batch)


class Ragged(nn.Module):
    def __init__(self):
        super().__init__()
        self.users, self.items = nn.Linear(WIDTH, 4), nn.Linear(WIDTH, 4)

    def forward(self, rows):
        return self.users(rows["users"]).sum() + self.items(rows["items"]).sum()


CASES = {"flat": Flat, "images": Images, "ragged": Ragged}


def batch(case: str, step: int, rank: int):
    """What a rank's model is given."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    if case == "flat":
        return torch.randint(0, 32, (1, 16), generator=generator)
    if case == "images":
        return [torch.randn(3, 5 + rank, 4 + number, generator=generator) for number in range(2)]
    counts = {"users": 3 + rank, "items": 5 - 3 * rank}
    return {name: torch.randn(count, WIDTH, generator=generator) for name, count in counts.items()}


def build(case: str) -> nn.Module:
    torch.manual_seed(0)
    return CASES[case]()


def main(*cases: str) -> None:
    for case in cases:
        model = DistributedDataParallel(build(case))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        for step in range(STEPS):
            loss = model(batch(case, step, dist.get_rank())).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            parallel.report(step, loss, dist.get_world_size())


if __name__ == "__main__":
    parallel.launch(main, *sys.argv[1:])
