"""Trains from a DataLoader whose workers run a module of their own: `loader.py fork|spawn|forkserver...`."""

import sys

import tiny
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset


class Rows(Dataset):
    def __init__(self):
        self.tokens = tiny.batch(0, [16], 0)
        torch.manual_seed(3)
        self.mlp = nn.Linear(tiny.SEQ, tiny.SEQ)

    def __len__(self):
        return 16

    def __getitem__(self, index):
        tokens, targets = self.tokens
        with torch.no_grad():
            noise = self.mlp(torch.ones(tiny.SEQ)).sum() * 0
        return tokens[index] + int(noise), targets[index]


def main(*methods: str) -> None:
    torch.set_num_threads(1)
    model = tiny.build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for method in methods:
        # Two that fork; others import torch, and one does for both questions.
        loader = DataLoader(Rows(), batch_size=4, num_workers=1 + (method == "fork"), multiprocessing_context=method)
        for step, (tokens, targets) in enumerate(loader):
            loss = tiny.loss_of(model(tokens), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            tiny.report(0, step, loss)


if __name__ == "__main__":
    main(*sys.argv[1:])
