"""torch.compile of one model after another: `compiled_cases.py compiled|plain CASE...`; `plain` compiles nothing.

What modules do, in the middle of a small model: `Uneven`; `some_` before that gives its modules other names.
`tiny` compiled in one of several ways: `tiny/blocks`. `@inductor` after a case has it compiled by inductor.
Prints what the compiler did, too.
"""

import collections
import dataclasses
import gc
import sys
import types

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

    def forward(self, x, scale=None, extra=(), mask=None, dtype=None, config=None):
        y = self.linear(x) * scale
        for each in extra:
            y = y + each
        return {"out": y, "more": (y.detach(), Answer(y * 2, [x]))}


class Structured(nn.Module):
    """Keywords, dicts, tuples and dataclasses, and what is none of these."""

    def __init__(self):
        super().__init__()
        self.part = Part()
        self.config = types.SimpleNamespace(width=WIDTH)

    def forward(self, x):
        answer = self.part(x, scale=x.sigmoid(), extra=[x, x * 2], mask=None, dtype=x.dtype, config=self.config)
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
    inner = model[1]
    if case == "Outside":
        inner.inside.compile(**options)
    elif case == "Uneven":
        for part in inner.parts:
            part.compile(**options)
    elif case == "Function":
        return torch.compile(lambda x: model(x).square(), **options)
    else:
        inner.compile(**options)
    return lambda x: model(x).square()


def train_case(case: str, prefix: str, backend: str | None, batches: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    parts = {"first": nn.Linear(WIDTH, WIDTH), "case": CASES[case](), "last": nn.Linear(WIDTH, 1)}
    model = nn.Sequential(collections.OrderedDict((prefix + name, part) for name, part in parts.items()))
    model[-1].bias.requires_grad_(False)
    call = lambda x: model(x).square()  # noqa: E731
    if backend is not None:
        call = compile_case(model, case, backend=backend, fullgraph=case != "Broken")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step, rows in enumerate(batches):
        x = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss = call(x).mean()
        loss.backward()
        optimizer.step()
        tiny.report(0, step, loss)


def backward(loss) -> None:
    loss.backward()


def train_tiny(how: str, backend: str | None) -> None:
    model, back = tiny.build(), backward
    model.embed.requires_grad_(False)
    call = model
    if backend is None:
        pass
    elif how == "blocks":
        for index, layer in enumerate(model.layers):
            model.layers[index] = torch.compile(layer, backend=backend, fullgraph=True)
    elif how == "model":
        model.compile(backend=backend)
    elif how == "backward":
        call = torch.compile(model, backend=backend, fullgraph=True)
        # What is compiled as a backward goes through compiled autograd.
        back = torch.compile(backward, backend=backend)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with torch._dynamo.config.patch(compiled_autograd=how == "backward"):
        for step in range(3):
            tokens, targets = tiny.batch(step, [4], 0)
            loss = tiny.loss_of(call(tokens), targets)
            optimizer.zero_grad()
            back(loss)
            optimizer.step()
            tiny.report(0, step, loss)


def report_compiler() -> None:
    """Graphs, how often torch.compile compiled, and graph breaks, since the last report."""
    counters, times = torch._dynamo.utils.counters, torch._dynamo.utils.compilation_time_metrics
    compiled = len(times["_compile.compile_inner"])
    breaks = sum(counters["graph_break"].values())
    print(f"graphs {counters['stats']['unique_graphs']} compiled {compiled} breaks {breaks}", flush=True)
    counters.clear()
    times.clear()


def main(how: str, *specs: str) -> None:
    torch.set_num_threads(1)
    # So that inductor tries out no compiler options, and no processes of its own.
    torch._inductor.config.cpp.vec_isa_ok = False
    torch._inductor.config.compile_threads = 1
    for spec in specs:
        torch._dynamo.reset()
        case, _, other = spec.partition("@")
        backend = (other or "aot_eager") if how == "compiled" else None
        if case.startswith("tiny/"):
            train_tiny(case.removeprefix("tiny/"), backend)
        else:
            prefix = "some_" if case.startswith("some_") else ""
            train_case(case.removeprefix(prefix), prefix, backend, (4, 4, 4) if other else (4, 6, 5))
        if how == "compiled":
            report_compiler()
        gc.collect()  # a compiled block holds itself


if __name__ == "__main__":
    main(*sys.argv[1:])
