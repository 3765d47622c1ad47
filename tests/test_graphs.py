"""Graphs of torch.compile are made anew where modules in them get other hooks, and nothing else is."""

import threading

import pytest
import torch
import torch._dynamo
from flexmodel_inside.graphs import Graphs
from torch import nn

BACKEND = "aot_eager"


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x).relu()


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def model_wrapped(model):
    return torch.compile(model, backend=BACKEND)


def model_itself(model):
    model.compile(backend=BACKEND)
    return model


def function(model):
    return torch.compile(lambda x: model(x) * 2, backend=BACKEND)


def broken(model):
    def step(x):
        torch._dynamo.graph_break()
        return model(x) * 2

    return torch.compile(step, backend=BACKEND)


def blocks(model):
    for block in model.blocks:
        block.compile(backend=BACKEND)
    return model


WAYS = (model_wrapped, model_itself, function, broken, blocks)


@pytest.fixture(scope="module")
def graphs() -> Graphs:
    found = Graphs(lambda _: None)
    found.watch(lambda function, what="": function)
    return found


@pytest.fixture(autouse=True)
def afresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled() -> int:
    """How often torch.compile compiled."""
    return len(torch._dynamo.utils.compilation_time_metrics.get("_compile.compile_inner", []))


def hook_it(model) -> list:
    """The first hooks of modules in a graph, which change what the model gives; and the modules that hold them. Blocks
    share a graph, so that each of them has one."""
    for block in model.blocks:
        block.linear.register_forward_hook(lambda _, args, output: output + 1)
    return [model.blocks[1].linear, model.blocks[1], model.blocks, model]


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("inline", [True, False])
def test_a_first_hook_is_in_the_next_graph(graphs, how, inline):
    x = torch.ones(2, 4, requires_grad=True)
    with torch._dynamo.config.patch(inline_inbuilt_nn_modules=inline):
        model = Model()
        call, other = how(model), torch.compile(lambda x: x.sin(), backend=BACKEND)
        first = call(x)
        other(x)
        affected = hook_it(model)
        assert torch.equal(call(x), first)  # torch.compile did not look
        assert graphs.forget(graphs.having(affected))
        before = compiled()
        other(x)
        assert compiled() == before
        hooked = call(x)
        assert not torch.equal(hooked, first) and compiled() > before
        before = compiled()
        assert torch.equal(call(x), hooked) and compiled() == before


def test_it_is_no_recompilation_to_a_job_that_wants_none(graphs):
    model, x = Model(), torch.ones(2, 4)
    call = torch.compile(model, backend=BACKEND)
    first = call(x)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert graphs.forget(graphs.having(hook_it(model)))
        assert not torch.equal(call(x), first)


def test_what_is_forgotten_does_not_count_towards_the_limit(graphs):
    model, x = Model(), torch.ones(2, 4)
    call = torch.compile(model, backend=BACKEND, fullgraph=True)
    for _ in range(2 * torch._dynamo.config.recompile_limit):
        before = compiled()
        call(x)
        assert compiled() == before + 1
        assert graphs.forget(graphs.having([model]))


def test_a_backward_pass_of_a_forgotten_graph_goes_on(graphs):
    model = Model()
    loss = torch.compile(model, backend=BACKEND)(torch.ones(2, 4)).sum()
    assert graphs.forget(graphs.having([model]))
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_nothing_is_forgotten_while_something_is_compiled(graphs):
    begun, go_on, inside, model = threading.Event(), threading.Event(), [], Model()
    torch.compile(model, backend=BACKEND)(torch.ones(2, 4))

    def waits(graph, _):
        inside.append(graphs.forget(graphs.having([model])))
        begun.set()
        go_on.wait(60)
        return graph.forward

    other = torch.compile(lambda x: x.cos(), backend=waits)
    thread = threading.Thread(target=lambda: other(torch.ones(2)))
    thread.start()
    assert begun.wait(60)
    found = graphs.having([model])
    assert found != [] and not graphs.forget(found)
    go_on.set()
    thread.join()
    assert inside == [False] and graphs.forget(found)


@pytest.mark.parametrize(
    "stance", [{"stance": "fail_on_recompile"}, {"stance": "eager_on_recompile"}, {"skip_guard_eval_unsafe": True}]
)
def test_a_job_that_forbids_it_for_a_part_of_its_steps_is_known(graphs, stance):
    assert graphs.forbidden() == ""
    for _ in range(3):
        with torch.compiler.set_stance(**stance):
            assert "set_stance" in graphs.forbidden()
        assert "set_stance" in graphs.forbidden()
        graphs.step_ended()
        assert "set_stance" in graphs.forbidden()
    graphs.step_ended()
    assert graphs.forbidden() == ""


@pytest.mark.parametrize("stance", ["force_eager", "eager_then_compile"])
def test_a_job_that_compiles_later_forbids_nothing(graphs, stance):
    with torch.compiler.set_stance(stance):
        assert graphs.forbidden() == ""
