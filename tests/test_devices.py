"""The device of a rank, on which ranks gather tensors, is that of its model."""

import types

import pytest
import torch
from flexmodel_inside import communicators
from torch._subclasses import FakeTensorMode

with FakeTensorMode():
    ON_CPU, ON_DEVICE = torch.empty(1), torch.empty(1, device="cuda:3")


class Communicators(communicators.Communicators):
    """Keeps what it would meet the others with."""

    def _meet(self, *meeting) -> None:
        self.device = meeting[-1]


def bridge(**functions) -> types.SimpleNamespace:
    return types.SimpleNamespace(plan=lambda: "a plan", revision=lambda: 0, **functions)


@pytest.fixture
def ranks(monkeypatch):
    """Two ranks, as torch tells of them; the machine's current device is its first."""
    c10d = types.SimpleNamespace(
        is_initialized=lambda: True,
        get_world_size=lambda: 2,
        get_rank=lambda: 1,
        _get_default_group=lambda: communicators,
        _get_default_store=lambda: types.SimpleNamespace(clone=lambda: None),
        PrefixStore=lambda *_: None,
    )
    cuda = types.SimpleNamespace(is_initialized=lambda: True, current_device=lambda: 0)
    monkeypatch.setitem(communicators.sys.modules, communicators.MODULE, c10d)
    monkeypatch.setitem(communicators.sys.modules, "torch.cuda", cuda)
    return cuda


def joined_at(parameters: list[torch.Tensor]) -> int:
    found = Communicators(bridge())
    found.join(lambda: parameters)
    found._thread.join()
    return found.device


def test_it_is_that_of_the_models_parameters_whatever_is_current(ranks):
    assert joined_at([ON_CPU, ON_DEVICE]) == 3
    # Offloaded, or none: all that there is to ask.
    assert joined_at([ON_CPU]) == joined_at([]) == 0
    ranks.is_initialized = lambda: False
    assert joined_at([ON_CPU]) == -1


def test_what_raises_leaves_each_rank_its_own_parts(ranks):
    said = []

    def parameters():
        raise RuntimeError("no parameters")

    Communicators(bridge(per_rank=said.append)).join(parameters)
    assert said == ["the ranks have no communicator: no parameters"]
