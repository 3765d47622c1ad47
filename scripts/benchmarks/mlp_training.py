"""An ordinary FSDP2 training script: eight MLP blocks, 16.8 MB of their outputs a step over both ranks.

    torchrun --nproc-per-node 2 mlp_training.py STEPS ROUNDS

Steps come in blocks of STEPS. FlexModel, if it is there, was told by the hooks which blocks to tap; the script taps
others with hooks of its own, and leaves others alone. Rank 0 prints one line a block: its variant, its steps' seconds,
and the seconds of CPU that this process used for them.
"""

import json
import sys
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

WIDTH, HIDDEN, LAYERS, ROWS = 512, 1024, 8, 512
VARIANTS = ("untapped", "flexmodel", "clone", "gather")


def order(round_number: int) -> tuple[str, ...]:
    """The variants of a round, each in another place the next time."""
    at = round_number % len(VARIANTS)
    return VARIANTS[at:] + VARIANTS[:at]


class Block(nn.Module):
    """A residual MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(self.norm(x))


class Own:
    """Taps as one writes them by hand."""

    def __init__(self, model: nn.Module, gathered: bool) -> None:
        self.kept: list[object] = []
        self._gathered = gathered
        self._handles = [block.mlp.register_forward_hook(self._hook) for block in model]

    def _hook(self, _module: nn.Module, _args: object, output: torch.Tensor) -> None:
        mine = output.detach().clone()
        if not self._gathered:
            self.kept.append(mine)
            return
        parts = [torch.empty_like(mine) for _ in range(dist.get_world_size())] if dist.get_rank() == 0 else None
        dist.gather(mine, parts, dst=0)
        if parts:
            self.kept.append(torch.cat(parts))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def main(steps: int, rounds: int) -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(*[Block() for _ in range(LAYERS)])
    for block in model:
        fully_shard(block)
    fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    x = torch.randn(ROWS, WIDTH)

    def step() -> float:
        start = time.perf_counter()
        loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return time.perf_counter() - start

    for _ in range(steps):
        step()
    for number in range(rounds):
        for variant in order(number):
            own = Own(model, variant == "gather") if variant in ("clone", "gather") else None
            dist.barrier()
            times, cpu = [], time.process_time()
            for _ in range(steps):
                times.append(step())
                if own:
                    own.kept.clear()
            cpu = time.process_time() - cpu
            if own:
                own.remove()
            time.sleep(0.5)  # whoever still has something to write writes it now, and not in the next block
            if dist.get_rank() == 0:
                print("BLOCK", json.dumps([variant, times, cpu]), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
