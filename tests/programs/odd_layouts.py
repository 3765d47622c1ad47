"""A module gives a tensor of which nobody can ask how it lies over the ranks: `odd_layouts.py [compiled]`.

Two tensor parallel ranks have tensors of a class that raises there. Compiled, in one process, it is FlexModel's own
question that raises, for any tensor of that width; without FlexModel nobody asks.
"""

import sys

import tiny
import torch
import torch.distributed as dist
from torch import nn

STEPS, WIDTH, ODD = 2, 4, 7


class Private(torch.Tensor):
    """Whether it is a view is nobody's business."""

    @property
    def _base(self):
        raise RuntimeError("a private base")


class Giving(nn.Linear):
    def forward(self, x):
        return super().forward(x).as_subclass(Private)


class Model(nn.Module):
    def __init__(self, odd: type[nn.Linear]):
        super().__init__()
        self.first, self.odd, self.last = nn.Linear(WIDTH, WIDTH), odd(WIDTH, ODD), nn.Linear(ODD, WIDTH)

    def forward(self, x):
        return self.last(self.odd(self.first(x)).as_subclass(torch.Tensor))


def raise_for_odd_widths() -> None:
    layouts = sys.modules.get("flexmodel_inside.layouts")
    if layouts is None:
        return
    described = layouts.Layouts._described

    def hostile(self, tensor, *rest):
        if tensor.dim() == 2 and tensor.shape[-1] == ODD:
            raise RuntimeError("a private base")
        return described(self, tensor, *rest)

    layouts.Layouts._described = hostile


def train(model: nn.Module, rank: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = model(torch.full((3, WIDTH), float(step + rank))).square().sum()
        loss.backward()
        optimizer.step()
        tiny.report(rank, step, loss)


def main(*how: str) -> None:
    torch.manual_seed(0)
    if how == ("compiled",):
        raise_for_odd_widths()
        model = Model(nn.Linear)
        model(torch.ones(3, WIDTH))  # it is known before it is compiled
        train(torch.compile(model, backend="aot_eager"), 0)
        return
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    # A mesh of the job's own, by whose name it shares the work on the same rows.
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    train(Model(Giving), rank)
    del mesh
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
