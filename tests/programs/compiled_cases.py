"""What modules do inside of torch.compile: `compiled_cases.py BACKEND CASE...`; the backend `none` does not compile."""

import dataclasses
import gc
import sys

import compiled
import tiny
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

WIDTH = 8


@dataclasses.dataclass
class Answer:
    hidden: torch.Tensor
    rest: list


class InPlace(nn.Module):
    """Changes what it is given, and what another module returned."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.act = nn.ReLU(inplace=True)
        self.second = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.second(self.act(self.first(x)))


class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, scale=None, extra=()):
        y = self.linear(x) * scale
        for each in extra:
            y = y + each
        return {"out": y, "more": (y.detach(), Answer(y * 2, [x]))}


class Structured(nn.Module):
    """Keywords, dicts, tuples and dataclasses."""

    def __init__(self):
        super().__init__()
        self.part = Part()

    def forward(self, x):
        answer = self.part(x, scale=x.sigmoid(), extra=[x, x * 2])
        return answer["out"] + answer["more"][1].hidden + answer["more"][0]


class Repeated(nn.Module):
    """Calls one module three times, one that returns what it is given, and gives one thing twice."""

    def __init__(self):
        super().__init__()
        self.again = nn.Linear(WIDTH, WIDTH)
        self.same = nn.Identity()
        self.pair = nn.Bilinear(WIDTH, WIDTH, WIDTH)

    def forward(self, x):
        for _ in range(3):
            x = self.again(x).tanh()
        x = self.same(x)
        return self.pair(x, x) + x


class Checkpointed(nn.Module):
    """Computes its parts anew in the backward."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(2))

    def forward(self, x):
        for part in self.parts:
            x = checkpoint(part, x, use_reentrant=False)
        return x


class Broken(nn.Module):
    """Breaks the graph between, and inside of, its parts."""

    def __init__(self):
        super().__init__()
        self.before = nn.Linear(WIDTH, WIDTH)
        self.breaks = nn.Sequential(nn.Linear(WIDTH, WIDTH), Breaks(), nn.Linear(WIDTH, WIDTH))
        self.after = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.after(self.breaks(self.before(x)))


class Breaks(nn.Module):
    def forward(self, x):
        torch._dynamo.graph_break()
        return x * 2


class Outside(nn.Module):
    """Is computed anew as a whole, by who calls it."""

    def __init__(self):
        super().__init__()
        self.inside = InPlace()

    def forward(self, x):
        return checkpoint(self.inside, x, use_reentrant=False)


class Uneven(nn.Module):
    """Modules of one class, of which some are tapped."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList(InPlace() for _ in range(4))

    def forward(self, x):
        for part in self.parts:
            x = part(x)
        return x


class Function(InPlace):
    """Called in a function that is compiled."""


CASES = {cls.__name__: cls for cls in (InPlace, Structured, Repeated, Checkpointed, Broken, Outside, Uneven, Function)}


def compile_case(model, case: str, **options):
    """What is called for `model`, with what the case says compiled."""
    if case == "Outside":
        model[1].inside.compile(**options)
    elif case == "Uneven":
        for part in model[1].parts:
            part.compile(**options)
    elif case == "Function":
        return torch.compile(lambda x: model(x).square(), **options)
    else:
        model[1].compile(**options)
    return lambda x: model(x).square()


def main(backend: str, *cases: str) -> None:
    torch.set_num_threads(1)
    for case in cases:
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(WIDTH, WIDTH), CASES[case](), nn.Linear(WIDTH, 1))
        call = lambda x, model=model: model(x).square()  # noqa: E731
        if backend != "none":
            call = compile_case(model, case, backend=backend, fullgraph=case != "Broken")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step, rows in enumerate((4, 6, 5)):
            x = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            loss = call(x).mean()
            loss.backward()
            optimizer.step()
            tiny.report(0, step, loss)
        if backend != "none":
            compiled.report_compiler()
        del model, call, optimizer
        gc.collect()


if __name__ == "__main__":
    main(*sys.argv[1:])
