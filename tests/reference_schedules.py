"""What the passes of a schedule compute, in one process that makes those of all ranks one after the other."""

import dataclasses

import schedules
import torch
from schedules import RATE, SCALE, WORLD, Event, Schedule

PARAMETER = "2.weight"


@dataclasses.dataclass
class Pass:
    """What one rank has of a pass. Gradients are of the scaled loss; None where nobody asks for any."""

    given: torch.Tensor
    hidden: torch.Tensor
    activated: torch.Tensor
    out: torch.Tensor
    parameter: torch.Tensor
    scale: float = 1.0
    gradient: torch.Tensor | None = None


class Reference:
    """All passes of a schedule, by event, turn and rank; and gradients of one parameter by event and turn, as backward
    passes left them and as the optimizer used them."""

    def __init__(self, schedule: Schedule, attempt: int) -> None:
        self.schedule, self.attempt = schedule, attempt
        names = [*schedule.models, "own"]
        self.models = {name: [schedules.build(name) for _ in range(WORLD)] for name in names}
        self.reduced = {name: [None] * len(list(self.models[name][0].parameters())) for name in names}
        self.scales = dict.fromkeys(names, SCALE if schedule.scaled else 1.0)
        self.passes: dict[tuple[int, int, int], Pass] = {}
        self.left: dict[tuple[int, int], tuple[torch.Tensor | None, list[torch.Tensor]]] = {}
        self.used: dict[tuple[int, int], torch.Tensor] = {}
        # What each rank's optimizer starts from.
        self.before: dict[tuple[int, int, int], torch.Tensor] = {}
        self.skipped: set[tuple[int, int]] = set()
        self.losses: list[list[torch.Tensor]] = [[] for _ in range(WORLD)]
        for index, event in enumerate(schedule.events):
            self.do(event, index)

    def do(self, event: Event, index: int) -> None:
        match event.name:
            case "barrier":
                pass
            case "step":
                self.step(event.model, (index, 0), range(WORLD))
            case "join":
                self.join(event, index)
            case name:
                for rank in event.ranks:
                    self.make(event, (index, 0, rank), event.number, event.rows[rank])
                if name in ("train", "accumulate"):
                    reduces = name == "train" and self.schedule.wrapper != "hand"
                    self.leave(event.model, (index, 0), reduces)
                if name == "train" and self.schedule.wrapper == "hand":
                    self.reduce(event.model)

    def make(self, event: Event, key: tuple[int, int, int], number: int, rows: int) -> None:
        rank = key[2]
        model = self.models[event.model][rank]
        x = schedules.given(self.attempt, self.schedule.seed, number, rank, rows)
        hidden = model[0](x)
        activated = model[1](hidden)
        activated.retain_grad()
        out = model[2](activated)
        made = self.passes[key] = Pass(x, hidden, activated, out, model[2].weight.detach().clone())
        if event.name == "attack":
            (made.gradient,) = torch.autograd.grad(out.sum(), activated)
        elif event.name in ("train", "accumulate", "join"):
            made.scale = self.scales[event.model]
            loss = schedules.loss_of(out, event, rank)
            (loss * made.scale).backward()
            made.gradient = activated.grad
            self.losses[rank].append(loss.detach())

    def reduce(self, name: str) -> None:
        """All ranks have the mean of their gradients, of which a sharded model takes each only once."""
        for at, parameters in enumerate(zip(*(model.parameters() for model in self.models[name]), strict=True)):
            of = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            mean = sum(of) / WORLD
            if self.schedule.sharded:
                before = self.reduced[name][at]
                self.reduced[name][at] = mean if before is None else before + mean
            for parameter in parameters:
                parameter.grad = None if self.schedule.sharded else mean.clone()

    def leave(self, name: str, key: tuple[int, int], reduces: bool) -> None:
        """A backward pass has left gradients: their mean if it reduces them, and else each rank's addend."""
        addends = [model[2].weight.grad for model in self.models[name]]
        addends = [None if addend is None else addend / self.scales[name] for addend in addends]
        if reduces:
            self.reduce(name)
        whole = self.reduced[name][2] if self.schedule.sharded else self.models[name][0][2].weight.grad
        self.left[key] = whole / self.scales[name] if reduces else None, addends

    def left_on(self, key: tuple[int, int], ranks) -> torch.Tensor:
        """What a backward pass has left on these ranks: the mean, or else the sum of their addends."""
        whole, addends = self.left[key]
        return sum(addends[rank] for rank in ranks) if whole is None else whole

    def parameter(self, *key: int) -> torch.Tensor:
        """What a pass used, or an optimizer started from."""
        made = self.passes.get(key)
        return self.before[key] if made is None else made.parameter

    def step(self, name: str, key: tuple[int, int], ranks) -> None:
        models = [self.models[name][rank] for rank in ranks]
        for rank, model in zip(ranks, models, strict=True):
            self.before[(*key, rank)] = model[2].weight.detach().clone()
        gradients = [p.grad for p in models[0].parameters()]
        if self.schedule.sharded:
            gradients = self.reduced[name]
        gradients = [gradient / self.scales[name] for gradient in gradients]
        self.used[key] = gradients[2]
        finite = all(gradient.isfinite().all() for gradient in gradients)
        for model in models:
            optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter.grad = gradient.clone()
            if finite:
                optimizer.step()
            optimizer.zero_grad()
        self.reduced[name] = [None] * len(gradients)
        if self.schedule.scaled:
            self.scales[name] *= 2.0 if finite else 0.5
        if not finite:
            self.skipped.add(key)

    def join(self, event: Event, index: int) -> None:
        for turn in range(max(event.rows)):
            active = [rank for rank in range(WORLD) if event.rows[rank] > turn]
            for rank in active:
                self.make(event, (index, turn, rank), event.number + turn, 2)
            self.leave(event.model, (index, turn), reduces=True)
            for rank in range(WORLD):
                if rank not in active:
                    self.models[event.model][rank].zero_grad()
            self.step(event.model, (index, turn), active)
        last = self.models[event.model][active[-1]].state_dict()
        for model in self.models[event.model]:
            model.load_state_dict(last)

