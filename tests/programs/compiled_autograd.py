"""Goes backward with torch's compiled autograd, which makes graphs of its own out of autograd's."""

import tiny
import torch
from torch import nn


def main(steps: int = 2) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    compiler = torch.compile(backend="aot_eager")
    for step in range(steps):
        loss = model(torch.randn(4, 8, generator=torch.Generator().manual_seed(step))).square().mean()
        optimizer.zero_grad()
        with torch._dynamo.compiled_autograd._enable(compiler):
            loss.backward()
        optimizer.step()
        tiny.report(0, step, loss)


if __name__ == "__main__":
    main()
