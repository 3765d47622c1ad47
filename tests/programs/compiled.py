"""torch.compile of a model: `compiled.py BACKEND HOW...`. Prints what the compiler did, too."""

import gc
import sys

import tiny
import torch

STEPS = 3


def compiled(model, how: str, **options):
    """The model as it is called, compiled as `how` says."""
    if how == "blocks":
        for layer in model.layers:
            layer.compile(**options)
    elif how == "wrapped-blocks":
        for index, layer in enumerate(model.layers):
            model.layers[index] = torch.compile(layer, **options)
    elif how == "method":
        model.compile(**options)
    elif how in ("model", "backward"):
        return torch.compile(model, **options)
    return model


def report_compiler() -> None:
    """Graphs, how often torch.compile compiled, and graph breaks, since the last report."""
    counters, times = torch._dynamo.utils.counters, torch._dynamo.utils.compilation_time_metrics
    compiled = len(times["_compile.compile_inner"])
    breaks = sum(counters["graph_break"].values())
    print(f"graphs {counters['stats']['unique_graphs']} compiled {compiled} breaks {breaks}", flush=True)
    counters.clear()
    times.clear()


def backward(loss) -> None:
    loss.backward()


def train(model, call, back=backward, steps: int = STEPS) -> None:
    """Trains `model`, whose forward is `call` and whose backward `back`."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(steps):
        tokens, targets = tiny.batch(step, [4], 0)
        loss = tiny.loss_of(call(tokens), targets)
        optimizer.zero_grad()
        back(loss)
        optimizer.step()
        tiny.report(0, step, loss)


def main(backend: str, *hows: str) -> None:
    torch.set_num_threads(1)
    for how in hows:
        torch._dynamo.reset()
        model = tiny.build()
        call = compiled(model, how, backend=backend, fullgraph=True)
        # What is compiled as a backward goes through compiled autograd.
        with torch._dynamo.config.patch(compiled_autograd=how == "backward"):
            train(model, call, torch.compile(backward, backend=backend) if how == "backward" else backward)
        report_compiler()
        del model, call
        gc.collect()  # a compiled block holds itself


if __name__ == "__main__":
    main(*sys.argv[1:])
