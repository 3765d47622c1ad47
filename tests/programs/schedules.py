"""Ranks that do not all do the same: random schedules of passes, of which some are made by all ranks and some by one.

`schedules.py SEEDS...`: `SEEDS` are those of one attempt of the job, as `0,1,2`; in each attempt but the last a rank
fails in the midst of the last of them. What a pass is given says which pass it is, and on which rank. Each rank prints
what it does, with the steps and microbatches that it counts itself.
"""

import contextlib
import dataclasses
import json
import os
import random
import sys

import torch
import torch.distributed as dist
from torch import nn

STEPS = 3
WORLD = 2
WIDTH = 12
RATE = 0.5
SCALE = 1024.0
WRAPPERS = ("hand", "ddp", "fsdp2", "fsdp1")
SHARDED = ("fsdp2", "fsdp1")
WITHOUT_GRADIENTS = ("evaluate", "sample")
REDUCED = ("train", "join")
EVERYONE = tuple(range(WORLD))


@dataclasses.dataclass(frozen=True)
class Event:
    """Something that ranks do. `number` is that of the pass, or of the first of a `join`; `rows` are those that each
    rank gives it, or the batches that each has. A `broken` one has an infinite loss on its first rank."""

    name: str
    model: str
    number: int
    ranks: tuple[int, ...] = EVERYONE
    rows: tuple[int, ...] = ()
    broken: bool = False


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What is done with some models. `owner` is a rank that has one more, and makes it before the others or after."""

    seed: int
    wrapper: str
    scaled: bool
    models: tuple[str, ...]
    owner: int | None
    first: bool
    events: tuple[Event, ...]
    fails: tuple[int, int]

    @property
    def sharded(self) -> bool:
        """No rank has all of the parameters."""
        return self.wrapper in SHARDED


class Drawing:
    """Draws the events of a schedule."""

    def __init__(self, seed: int) -> None:
        self.choice = random.Random(seed)
        self.events: list[Event] = []
        self.passes = 0

    def chance(self, share: float) -> bool:
        return self.choice.random() < share

    def one_of(self, *values):
        return self.choice.choice(values)

    def add(self, name: str, model: str = "", ranks=EVERYONE, **more) -> None:
        rows = tuple(self.choice.randint(1, 3) for _ in EVERYONE)
        self.events.append(Event(name, model, self.passes, tuple(ranks), **{"rows": rows} | more))
        self.passes += max(rows)

    def between(self, schedule: Schedule, names: tuple[str, ...], most: int) -> None:
        """Up to `most` events that train nothing."""
        for _ in range(self.choice.randint(0, most)):
            name, model = self.choice.choice(names), self.choice.choice(schedule.models)
            if name == "barrier":
                self.add(name)
            elif name == "evaluate":
                self.add(name, model)
                # What was gathered for it stays, until somebody trains.
                if schedule.wrapper == "fsdp2" and self.chance(0.5):
                    self.add("sample", model, [self.one_of(*EVERYONE)])
            elif schedule.owner is not None and (schedule.sharded or self.chance(0.3)):
                self.add(name, "own", [schedule.owner])
            elif not schedule.sharded:
                self.add(name, model, [self.one_of(*EVERYONE)])
                if self.chance(0.2):
                    self.events.append(self.events[-1])

    def training(self, schedule: Schedule) -> None:
        """What ends with a step, mostly."""
        model = self.choice.choice(schedule.models)
        is_clean = not self.events or self.events[-1].name in ("step", "join")
        if schedule.wrapper == "ddp" and not schedule.scaled and is_clean and self.chance(0.3):
            self.add("join", model)
            return
        for _ in range(self.choice.randint(0, 2)):
            self.add("accumulate", model)
            self.between(schedule, ("sample", "attack", "barrier"), 1)
        alone = schedule.wrapper == "hand" and not schedule.scaled and self.chance(0.2)
        ranks = [self.one_of(*EVERYONE)] if alone else EVERYONE
        self.add("train", model, ranks, broken=schedule.scaled and self.chance(0.3))
        self.between(schedule, ("sample", "barrier"), 2)
        if self.chance(0.8):
            self.add("step", model)


def draw(seed: int) -> Schedule:
    """The schedule of a seed."""
    drawing = Drawing(seed)
    schedule = Schedule(
        seed=seed,
        wrapper=WRAPPERS[seed % len(WRAPPERS)],
        scaled=drawing.chance(0.4),
        models=("main", "twin") if drawing.chance(0.5) else ("main",),
        owner=drawing.one_of(None, *EVERYONE),
        first=drawing.chance(0.5),
        events=(),
        fails=(0, 0),
    )
    for _ in range(STEPS):
        drawing.between(schedule, ("sample", "attack", "evaluate", "barrier"), 3)
        drawing.training(schedule)
    fails = (drawing.one_of(*EVERYONE), drawing.choice.randrange(len(drawing.events)))
    return dataclasses.replace(schedule, events=tuple(drawing.events), fails=fails)


def given(attempt: int, seed: int, number: int, rank: int, rows: int) -> torch.Tensor:
    """What a rank gives a model in a pass."""
    x = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(10_000 * attempt + 100 * number + rank))
    x[:, :4] = torch.tensor([attempt, seed, number, rank]) / 64
    return x


def build(model: str) -> nn.Module:
    """A model as it is before anything; all are alike."""
    torch.manual_seed(("main", "twin", "own").index(model))
    return nn.Sequential(nn.Linear(WIDTH, 5), nn.Tanh(), nn.Linear(5, 3))


def loss_of(output: torch.Tensor, event: Event, rank: int) -> torch.Tensor:
    """The loss of a training pass."""
    loss = output.pow(2).mean()
    return loss * float("inf") if event.broken and rank == event.ranks[0] else loss


def say(line: str) -> None:
    """Prints a line such that no other rank's comes into it."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


class Diary:
    """What this rank does, and the step and microbatch as it counts them."""

    def __init__(self, attempt: int, rank: int) -> None:
        self.attempt, self.rank = attempt, rank
        self.step, self.stepped = 0, False
        self.seed, self.index, self.turn = 0, 0, 0
        self._counted: dict[tuple, int] = {}

    def write(self, what: str, **more) -> None:
        """Everything that is known of the event under way."""
        known = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        say(f"DIARY {json.dumps({'what': what} | known | more)}")

    @contextlib.contextmanager
    def a_pass(self, model: str, train: bool):
        """In it a pass is made."""
        self.step += self.stepped
        self.stepped = False
        key = (self.seed, model, self.step, train)
        micro = self._counted[key] = self._counted.get(key, -1) + 1
        self.write("begin", model=model, micro=micro, train=train)
        yield
        self.write("end", model=model, micro=micro, train=train)


class Job:
    """One rank of a schedule."""

    def __init__(self, schedule: Schedule, attempt: int, rank: int, diary: Diary) -> None:
        self.schedule, self.attempt, self.rank, self.diary = schedule, attempt, rank, diary
        self.losses: list[torch.Tensor] = []
        self.joined: set[str] = set()
        self.models: dict[str, nn.Module] = {}
        names = list(schedule.models)
        if schedule.owner == rank:
            names.insert(0 if schedule.first else len(names), "own")
        for name in names:
            self.models[name] = build(name) if name == "own" else self.wrap(build(name))
        self.optimizers = {name: torch.optim.SGD(self.models[name].parameters(), lr=RATE) for name in schedule.models}
        self.scalers = {name: self.scaler() for name in schedule.models}

    def wrap(self, model: nn.Module) -> nn.Module:
        match self.schedule.wrapper:
            case "ddp":
                return nn.parallel.DistributedDataParallel(model)
            case "fsdp2":
                from torch.distributed.device_mesh import init_device_mesh
                from torch.distributed.fsdp import fully_shard

                return fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)), reshard_after_forward=False)
            case "fsdp1":
                from torch.distributed.fsdp import FullyShardedDataParallel

                return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
        return model

    def scaler(self):
        options = {"init_scale": SCALE, "growth_interval": 1, "enabled": self.schedule.scaled}
        if self.schedule.wrapper == "fsdp1":
            from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

            return ShardedGradScaler("cpu", **options)
        return torch.amp.GradScaler("cpu", **options)

    def run(self, until: int | None) -> None:
        """Everything, or what comes before an event in which this rank fails."""
        self.diary.seed = self.schedule.seed
        for index, event in enumerate(self.schedule.events):
            self.diary.index = index
            if index == until:
                os._exit(17)
            self.diary.turn = 0
            if self.rank in event.ranks or event.name in REDUCED:
                self.do(event)

    def do(self, event: Event) -> None:
        match event.name:
            case "barrier":
                dist.barrier()
            case "step":
                self.step(event.model)
            case "join":
                self.join(event)
            case "evaluate" | "sample" | "attack":
                self.forward_only(event)
            case _:
                if self.rank in event.ranks:
                    self.train(event, event.number, event.rows[self.rank])
                if event.name == "train" and self.schedule.wrapper == "hand":
                    self.reduce(event.model)

    def given(self, number: int, rows: int) -> torch.Tensor:
        return given(self.attempt, self.schedule.seed, number, self.rank, rows)

    def forward_only(self, event: Event) -> None:
        x, model = self.given(event.number, event.rows[self.rank]), self.models[event.model]
        attack = event.name == "attack"
        # A wrapper of which somebody has joined calls a collective in each pass from then on.
        if attack or (event.name == "sample" and (event.number % 2 or event.model in self.joined)):
            model = getattr(model, "module", model)
        with self.diary.a_pass(event.model, train=attack), torch.set_grad_enabled(attack):
            if attack:
                torch.autograd.grad(model(x.requires_grad_()).sum(), x)
            else:
                model(x)

    def train(self, event: Event, number: int, rows: int) -> None:
        model = self.models[event.model]
        with self.diary.a_pass(event.model, train=True), self.without_sync(model, event.name == "accumulate"):
            loss = loss_of(model(self.given(number, rows)), event, self.rank)
            self.scalers[event.model].scale(loss).backward()
        self.losses.append(loss.detach())

    @contextlib.contextmanager
    def without_sync(self, model: nn.Module, wanted: bool):
        if not wanted or self.schedule.wrapper == "hand":
            yield
        elif self.schedule.wrapper == "fsdp2":
            model.set_requires_gradient_sync(False)
            yield
            model.set_requires_gradient_sync(True)
        else:
            with model.no_sync():
                yield

    def reduce(self, model: str) -> None:
        for parameter in self.models[model].parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
            parameter.grad /= WORLD

    def join(self, event: Event) -> None:
        """Ranks have different numbers of batches."""
        self.joined.add(event.model)
        with self.models[event.model].join():
            for turn in range(event.rows[self.rank]):
                self.diary.turn = turn
                self.train(event, event.number + turn, 2)
                self.step(event.model)

    def step(self, model: str) -> None:
        self.scalers[model].step(self.optimizers[model])
        self.diary.write("step", model=model)
        self.diary.stepped = True
        self.scalers[model].update()
        self.optimizers[model].zero_grad()


def main() -> None:
    torch.set_num_threads(1)
    attempts = sys.argv[1:]
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    diary = Diary(attempt, rank)
    *seeds, last = [int(seed) for seed in attempts[attempt].split(",")]
    fails = attempt < len(attempts) - 1
    losses, kept = [], []
    for seed in [*seeds, last]:
        job = Job(draw(seed), attempt, rank, diary)
        failing, at = job.schedule.fails
        job.run(until=at if fails and seed == last and rank == failing else None)
        kept.append(job)  # so that each of its models has a number of its own
        losses += job.losses
    if rank == 0:
        say(" ".join(["LOSSES", *(float(loss).hex() for loss in losses)]))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
