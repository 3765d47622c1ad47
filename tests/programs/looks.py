"""Counts the modules that FlexModel, which is in HOME, looks at: `looks.py HOME`. Nothing is tapped."""

import sys
import types

import torch
from torch import nn

WIDTH = 4
LOOKS: list[int] = []


def select(serial, entries, *_about) -> tuple[list, list]:
    LOOKS.append(len(entries))
    return [], []


class Codes(types.ModuleType):
    """Stands for the bridge's module, which has codes as constants."""

    def __getattr__(self, name: str) -> int:
        if not name.isupper():
            raise AttributeError(name)
        return self.__dict__.setdefault(name, len(self.__dict__))


def watch(home: str) -> None:
    sys.path.insert(0, home)
    sys.modules["flexmodel_inside._bridge"] = Codes("flexmodel_inside._bridge")
    from flexmodel_inside.discovery import Discovery

    def nothing(*_about) -> None:
        pass

    names = ("forget", "resolved", "stepped", "finish", "faults_with", "wants", "plan", "due", "turn")
    names += ("describe_with", "capture_parameters_with", "undo_with", "count_collectives_with", "turn_with")
    told = {"fault": print, "notice": print}
    told |= {"active": lambda: True, "pass_hooks": lambda *_about: (nothing, nothing)}
    bridge = types.SimpleNamespace(select=select, **told, **dict.fromkeys(names, nothing))
    Discovery(bridge).watch()


def say(what: str) -> None:
    print(what, *LOOKS)
    LOOKS.clear()


def main(home: str) -> None:
    watch(home)
    layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
    model = nn.Sequential(*layers, nn.ReLU())
    x, y = torch.ones(2, WIDTH), torch.tensor([0, 1])
    model(x)
    say("first")
    for _ in range(2):
        nn.CrossEntropyLoss()(model(x), y)
        say("inline")
    nn.Tanh()(model(x))
    say("nothing")
    model.insert(1, nn.Linear(WIDTH, WIDTH))
    model(x)
    say("inserted")
    model._modules["2"] = nn.Linear(WIDTH, WIDTH)
    model(x)
    say("replaced")


if __name__ == "__main__":
    main(sys.argv[1])
