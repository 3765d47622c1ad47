"""Trains and compiles with importers of its own on `sys.meta_path`: `importers.py first|reversed|replaced`."""

import importlib.abc
import importlib.machinery
import sys


class Importer(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Makes modules of some names up."""

    def find_spec(self, name, path, target=None):
        return importlib.machinery.ModuleSpec(name, self) if name.startswith("made_up") else None

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        module.value = len(module.__name__)


def main(how: str) -> None:
    before = list(sys.meta_path)
    sys.meta_path.insert(0, Importer())
    import made_up
    import tiny
    import torch

    if how == "reversed":
        sys.meta_path.reverse()
    if how == "replaced":
        sys.meta_path = [Importer(), *before]
    import made_up_with_torch
    import torch._dynamo
    import made_up_with_dynamo  # isort: skip

    torch.set_num_threads(1)
    model = tiny.build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def loss_of(tokens, targets):
        return tiny.loss_of(model(tokens), targets)

    for step in range(3):
        if step == 2:
            loss_of = torch.compile(loss_of, backend="eager", fullgraph=True)
        loss = loss_of(*tiny.batch(step, [4], 0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        tiny.report(0, step, loss)
    import made_up_at_the_end

    print(made_up.value, made_up_with_torch.value, made_up_with_dynamo.value, made_up_at_the_end.value)


if __name__ == "__main__":
    main(sys.argv[1])
