"""CUDA graphs, by hand and by torch: `cuda_graphs.py beside|callables|compiled STEPS cuda|cpu`. A CPU captures nothing.

`beside`: taps fire while a graph is captured in torch's strictest mode, inside of it, and beside its replays.
`callables`: `torch.cuda.make_graphed_callables` of a module that was called before.
`compiled`: `torch.compile`, whose mode reduce-overhead makes graphs by itself.
"""

import sys
import time

import torch
from torch import nn

WIDTH, DEPTH = 64, 4


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(DEPTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


class Graph:
    """What `model(x)` puts on its stream, captured there; on a CPU the call itself, made again by each replay."""

    def __init__(self, model: Small, x: torch.Tensor, stream: "torch.cuda.Stream | None") -> None:
        self._again = None if x.is_cuda else (model, x)
        if self._again:
            self.out = model(x)
            return
        self._graph = torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._graph.capture_begin()  # `torch.cuda.graph` would wait for the device first
            self.out = model(x)
            time.sleep(0.002)
            self._graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)

    def replay(self) -> None:
        if self._again:
            model, x = self._again
            self.out = model(x)
        else:
            self._graph.replay()


@torch.no_grad()
def beside(steps: int, device: str) -> None:
    """In each step a graph is captured while what a tap has just copied is still behind a kernel that takes long."""
    torch.manual_seed(0)
    warm, model = Small().to(device), Small().to(device)
    x = torch.randn(32, WIDTH).to(device)
    stream = torch.cuda.Stream() if x.is_cuda else None
    torch.addmm(x[0], x, x.t() @ x)  # cuBLAS is there, and no module has been called
    graphs = [Graph(model, x, stream)]  # kept: their memory is their own for as long as they may run
    for _ in range(steps):
        graphs[0].replay()
        if x.is_cuda:
            torch.cuda._sleep(20_000_000)  # cycles
        out = warm(x)
        graphs.append(Graph(model, x, stream))
        graphs[-1].replay()
    print("sums", *(each.sum().item().hex() for each in (graphs[0].out, graphs[-1].out, out)))


def callables(steps: int, device: str) -> None:
    torch.manual_seed(0)
    model = Small().to(device)
    x = torch.randn(32, WIDTH).to(device).requires_grad_()
    model(x).sum().backward()
    if x.is_cuda:
        model = torch.cuda.make_graphed_callables(model, (x.detach().clone().requires_grad_(),))
    for step in range(steps):
        loss = model(x).square().mean()
        loss.backward()
        print(f"step {step} loss {loss.item().hex()}")


def compiled(steps: int, device: str) -> None:
    torch.manual_seed(0)
    model = Small().to(device)
    how = {"mode": "reduce-overhead"} if device == "cuda" else {"backend": "aot_eager"}
    fast = torch.compile(model, **how)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(steps):
        x = torch.randn(32, WIDTH, generator=torch.Generator().manual_seed(step)).to(device).requires_grad_()
        loss = fast(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step} loss {loss.item().hex()}")


if __name__ == "__main__":
    {"beside": beside, "callables": callables, "compiled": compiled}[sys.argv[1]](int(sys.argv[2]), sys.argv[3])
