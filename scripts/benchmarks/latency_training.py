"""An ordinary script with one tapped module: a 1 MiB output every few milliseconds.

    python latency_training.py STEPS
"""

import sys
import time

import torch
from torch import nn


def main(steps: int) -> None:
    torch.set_num_threads(1)
    model = nn.Sequential(nn.Linear(256, 256))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    x = torch.randn(1024, 256)
    for _ in range(steps):
        loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        time.sleep(0.01)


if __name__ == "__main__":
    main(int(sys.argv[1]))
