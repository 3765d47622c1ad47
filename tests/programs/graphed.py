"""CUDA graphs on the CPU: `graphed.py CASE`. What captures and replays them is a stand-in, and so is the CPU, which
FlexModel takes for a device that is captured while the environment says so (`wire::env::TEST_GRAPH`).

| case | |
|---|---|
| `plain`, `compiled` | trains, and captures one step of its own |
| `made` | has torch make graphs of modules and of a function |
| `operations` | says what FlexModel's operations are given in the graphs of torch.compile |
"""

import collections
import contextlib
import os
import sys
from unittest import mock

import tiny
import torch
from torch.profiler import ProfilerActivity, profile

STEPS = 4
# The step that is captured.
CAPTURED = 2
PASSES = 3


@contextlib.contextmanager
def capturing(*_args, **_kwargs):
    """Stands in for `torch.cuda.graph`, where FlexModel is told to believe it."""
    believed = "FLEXMODEL_TEST_GRAPH" in os.environ
    os.environ |= {"FLEXMODEL_TEST_GRAPH": "1"} if believed else {}
    try:
        yield
    finally:
        os.environ |= {"FLEXMODEL_TEST_GRAPH": "0"} if believed else {}


def train(compiled: bool) -> None:
    model = tiny.build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    called = torch.compile(model, backend="aot_eager") if compiled else model
    for step in range(STEPS):
        tokens, targets = tiny.batch(step, [4], 0)
        with contextlib.ExitStack() as during:
            done = None
            if step == CAPTURED:
                during.enter_context(capturing())
                # A graph of the compiler's calls ours, which make tensors of the CPU.
                done = None if compiled else during.enter_context(profile(activities=[ProfilerActivity.CPU]))
            optimizer.zero_grad()
            loss = tiny.loss_of(called(tokens), targets)
            loss.backward()
        if done is not None:
            names = collections.Counter(event.name for event in done.events() if event.name.startswith("aten::"))
            print("done", {name: count for name, count in sorted(names.items()) if "detach" not in name})
        optimizer.step()
        tiny.report(0, step, loss)


def made() -> None:
    model = tiny.build().requires_grad_(False)
    tokens, targets = tiny.batch(0, [4], 0)
    hidden = torch.ones(4, tiny.SEQ, tiny.WIDTH)

    def report(step: int) -> None:
        tiny.report(0, step, tiny.loss_of(model(tokens), targets))

    # Taps are there when graphs are made.
    report(0)
    handle = model.layers[0].attn.register_forward_hook(lambda *_: None)
    stand_ins = {"CUDAGraph": mock.MagicMock, "graph": capturing, "synchronize": lambda: None, "Stream": lambda: None}
    stand_ins |= {"stream": contextlib.nullcontext}
    with mock.patch.multiple(torch.cuda, **stand_ins), mock.patch.object(torch.cuda.graphs, "graph_pool_handle"):
        torch.cuda.make_graphed_callables(model.layers[0], (hidden,))
        try:
            torch.cuda.graphs.make_graphed_callables(callables=model.layers[1], sample_args=("no tensor",))
        except AssertionError as e:
            print("raised", str(e).split(",")[0])
        torch.cuda.make_graphed_callables((lambda x: model.layers[1].mlp(x),), ((hidden,),))
    handle.remove()
    print("hooks of the job's", [key for key in model.layers[0].attn._forward_hooks if key >= 0])
    for step in range(1, PASSES):
        report(step)


def operations() -> None:
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.scheduler import Scheduler

    def look(graph, _inputs):
        for node in graph.graph.nodes:
            wrapped = node.target is torch.ops.higher_order.with_effects
            target, args = (node.args[1], node.args[2:]) if wrapped else (node.target, node.args)
            if getattr(target, "namespace", None) == "flexmodel":
                value = args[0].meta["val"]
                print("given", target.name(), value.device, value.dtype, value.dim())
        return graph.forward

    def spied(asked):
        def should_partition(self, node):
            reason = asked(self, node)
            print("cut", getattr(node.node, "op_overload", None), reason, sep="|")
            return reason

        return should_partition

    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("flexmodel::"):
            first = torch._C._get_schema(name, "").arguments[0]
            print("operation", name, first.type, first.name)
    for backend in (aot_autograd(fw_compiler=look, bw_compiler=look), "inductor"):
        torch._dynamo.reset()
        model = tiny.build(layers=1)
        tokens, targets = tiny.batch(0, [4], 0)

        def loss(model=model, tokens=tokens, targets=targets):
            return tiny.loss_of(model(tokens), targets)

        # FlexModel comes to know of the scheduler before the first graph.
        of_inductor = mock.patch.object(Scheduler, "should_partition", spied(Scheduler.should_partition))
        with of_inductor if backend == "inductor" else contextlib.nullcontext():
            torch.compile(loss, backend=backend)().backward()


if __name__ == "__main__":
    torch.set_num_threads(1)
    case = sys.argv[1]
    {"made": made, "operations": operations}.get(case, lambda: train(case == "compiled"))()
