"""A Llama of transformers under DistributedDataParallel, whose ranks pad their sequences to their own longest, as a
data collator does: `padded.py right left`, a model for each side.
"""

import sys

import parallel
import tiny
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tp_llama import build

STEPS = 3
SIZES = (3, 2)
"""Rows of each rank."""


def lengths(step: int) -> list[list[int]]:
    """Of the sequences of each rank; in the last step both have the same longest."""
    return [[[3, 7, 4], [10, 5]], [[9, 2, 6], [6, 4]], [[8, 5, 3], [2, 8]]][step]


def sequences(step: int) -> list[list[torch.Tensor]]:
    """Tokens of each rank, none of them the padding."""
    generator = torch.Generator().manual_seed(step)
    return [[torch.randint(1, tiny.VOCAB, (n,), generator=generator) for n in rank] for rank in lengths(step)]


def collate(rows: list[torch.Tensor], side: str, length: int = 0) -> dict[str, torch.Tensor]:
    """A batch as long as its longest sequence, or longer."""
    length = max(length, *map(len, rows))
    batch = {"input_ids": [], "attention_mask": [], "labels": []}
    for row in rows:
        missing = length - len(row)
        ends = (0, missing) if side == "right" else (missing, 0)
        filled = torch.nn.functional.pad
        batch["input_ids"].append(filled(row, ends))
        batch["attention_mask"].append(filled(torch.ones_like(row), ends))
        # The first token is not predicted: some rows have padding before it.
        predicted = torch.cat([torch.tensor([-100]), row[1:]])
        batch["labels"].append(filled(predicted, ends, value=-100))
    stacked = {key: torch.stack(value) for key, value in batch.items()}
    # The first token is at position 0, wherever its row begins.
    return stacked | {"position_ids": (stacked["attention_mask"].cumsum(1) - 1).clamp(min=0)}


def main(sides: list[str]) -> None:
    for side in sides:
        model = DistributedDataParallel(build())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(STEPS):
            batch = collate(sequences(step)[dist.get_rank()], side)
            loss = model(**batch, use_cache=False).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            parallel.report(step, loss, dist.get_world_size())


if __name__ == "__main__":
    parallel.launch(main, sys.argv[1:])
