"""Saves models that ran (`saved.py save FILE`), or uses them as whoever gets the file does (`saved.py load FILE`)."""

import copy
import io
import sys

import torch
from torch import nn

WIDTH = 4


class Stateful(nn.Linear):
    """Says by itself what is saved of it."""

    def __getstate__(self):
        return self.__dict__ | {"saved": True}


def models() -> dict[str, nn.Module]:
    plain = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU())
    return {
        "plain": plain,
        "stateful": nn.Sequential(Stateful(WIDTH, WIDTH)),
        "parametrized": nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))),
        "traced": torch.fx.symbolic_trace(plain),
    }


def hooks(model: nn.Module) -> list[list[str]]:
    names = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
             "_forward_pre_hooks_with_kwargs")  # fmt: skip
    return [[type(hook).__name__ for hook in getattr(m, name).values()] for m in model.modules() for name in names]


def save(path: str) -> None:
    saved = {}
    for name, model in models().items():
        model(torch.ones(1, WIDTH))
        shallow, deep = copy.copy(model), copy.deepcopy(model)
        print(name, "copied", len(shallow._forward_hooks), hooks(deep))
        file = io.BytesIO()
        try:
            torch.save(model, file)
            saved[name] = file.getvalue()
        except RuntimeError as e:
            print(name, e)
    torch.save(saved, path)


def load(path: str) -> None:
    x = torch.ones(1, WIDTH)
    for name, data in torch.load(path, weights_only=False).items():
        model = torch.load(io.BytesIO(data), weights_only=False)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        print(name, hooks(model), model(x).tolist(), compiled(x).tolist())
        if name == "plain":
            print(torch.jit.script(model)(x).tolist())


if __name__ == "__main__":
    torch.manual_seed(0)
    {"save": save, "load": load}[sys.argv[1]](sys.argv[2])
