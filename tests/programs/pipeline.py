"""Two pipeline stages of torch.distributed.pipelining, four microbatches: `pipeline.py 1F1B|GPipe...`, one by one.

Every stage is the whole model with the parts deleted that other stages have, so that names are those of the model.
"""

import sys

import parallel
import tiny
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import get_schedule_class

STEPS = 2
LAYERS = 4
SIZES = (2, 2, 2, 2)


class Net(tiny.Net):
    """`tiny.Net` that does with the parts it has."""

    def __init__(self):
        super().__init__(layers=LAYERS)
        self.layers = nn.ModuleDict({str(n): layer for n, layer in enumerate(self.layers)})

    def forward(self, x):
        x = self.embed(x) if self.embed else x
        for layer in self.layers.values():
            x = layer(x)
        return self.lm_head(self.norm(x)) if self.lm_head else x


def build() -> Net:
    """The whole model, as one process has it."""
    torch.manual_seed(0)
    return Net()


def stage_of(model: Net, stage: int, stages: int) -> Net:
    """Keeps what `stage` runs."""
    share = LAYERS // stages
    for name in list(model.layers):
        if int(name) // share != stage:
            del model.layers[name]
    if stage > 0:
        model.embed = None
    if stage < stages - 1:
        model.norm = model.lm_head = None
    return model


def train(name: str) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    model = stage_of(build(), rank, world)
    stage = PipelineStage(model, rank, world, torch.device("cpu"))
    schedule = get_schedule_class(name)(stage, n_microbatches=len(SIZES), loss_fn=tiny.loss_of)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(STEPS):
        tokens, targets = tiny.batch(step, [sum(SIZES)], 0)
        losses: list[torch.Tensor] = []
        optimizer.zero_grad()
        if rank == 0:
            schedule.step(tokens)
        else:
            schedule.step(target=targets, losses=losses)
        optimizer.step()
        loss = torch.stack(losses).mean().detach() if losses else torch.zeros(())
        dist.broadcast(loss, src=world - 1)
        tiny.report(rank, step, loss)


def main(*names: str) -> None:
    for name in names:
        train(name)


if __name__ == "__main__":
    parallel.launch(main, *sys.argv[1:])
