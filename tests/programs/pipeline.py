"""Stages of torch.distributed.pipelining on two ranks, four microbatches: `pipeline.py SCHEDULE...`, one by one.

Every stage is the whole model with the parts deleted that other stages have, so that names are those of the model. With
`parts-` before the schedule it is made of parts of a model that stays; with `traced-` torch cuts one, which stays too.
Schedules that loop have two stages on a rank.
"""

import sys

import parallel
import tiny
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, SplitPoint, pipeline
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, get_schedule_class

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


def made_of_parts(model: Net) -> Net:
    """A stage with what another model has: another object with the same forward."""
    other = Net.__new__(Net)
    nn.Module.__init__(other)
    other.embed, other.norm, other.lm_head = model.embed, model.norm, model.lm_head
    other.layers = nn.ModuleDict(dict(model.layers.items()))
    return other


def stages_of(wholes: list[Net], how: str, numbers: range, count: int) -> list[PipelineStage]:
    """This rank's stages, each of a whole model of its own."""
    cpu = torch.device("cpu")
    if how == "traced":
        splits = {f"layers.{n}": SplitPoint.BEGINNING for n in range(LAYERS // count, LAYERS, LAYERS // count)}
        tokens, _ = tiny.batch(0, list(SIZES), 0)
        pipes = [pipeline(whole, mb_args=(tokens,), split_spec=splits) for whole in wholes]
        return [pipe.build_stage(number, cpu) for pipe, number in zip(pipes, numbers, strict=True)]
    models = [made_of_parts(whole) if how == "parts" else whole for whole in wholes]
    pairs = zip(models, numbers, strict=True)
    return [PipelineStage(stage_of(model, number, count), number, count, cpu) for model, number in pairs]


def advance(schedule, optimizer, tokens, targets, first: bool) -> torch.Tensor:
    """A step of a rank that has the `first` stage, or the last. Returns its mean loss; 0 without the last stage."""
    losses: list[torch.Tensor] = []
    optimizer.zero_grad()
    if first:
        schedule.step(tokens)
    else:
        schedule.step(target=targets, losses=losses)
    optimizer.step()
    return torch.stack(losses).mean().detach() if losses else torch.zeros(())


def train(name: str) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    how, _, name = name.rpartition("-")
    cls = get_schedule_class(name)
    loops = issubclass(cls, PipelineScheduleMulti)
    count = 2 * world if loops else world
    numbers = range(rank, count, world)
    wholes = [build() for _ in numbers]
    stages = stages_of(wholes, how, numbers, count)
    schedule = cls(stages if loops else stages[0], n_microbatches=len(SIZES), loss_fn=tiny.loss_of)
    optimizer = torch.optim.SGD([p for stage in stages for p in stage.submod.parameters()], lr=0.1)
    for step in range(STEPS):
        tokens, targets = tiny.batch(step, [sum(SIZES)], 0)
        loss = advance(schedule, optimizer, tokens, targets, rank == 0)
        dist.broadcast(loss, src=world - 1)
        tiny.report(rank, step, loss)


def main(*names: str) -> None:
    for name in names:
        train(name)


if __name__ == "__main__":
    parallel.launch(main, *sys.argv[1:])
