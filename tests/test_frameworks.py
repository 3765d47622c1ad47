"""Adapters of frameworks: who is asked, what they are shown, and what they must not do."""

import dataclasses
import pathlib
import subprocess
import sys
import types

import pytest
import torch
from flexmodel_inside import frameworks, naming
from flexmodel_inside.faults import Faults
from flexmodel_inside.frameworks import ADAPTERS, Frameworks, Job
from flexmodel_inside.frameworks.adapter import Adapter
from flexmodel_inside.layouts import Layouts
from flexmodel_inside.mesh import Meshes
from flexmodel_inside.parameters import ParameterTaps
from torch import nn

FOLDER = pathlib.Path(frameworks.__file__).parent


class Present(Adapter):
    """Sees everything."""

    def __init__(self, job):
        super().__init__(job)
        self.seen: list[nn.Module] = []

    def see(self, module, model):
        self.seen.append(module)
        model.wrapped("Present")

    def held_as(self, parameter, model):
        return [parameter]


class Absent(Present):
    imports = ("a_framework_that_the_job_has_not_imported",)


class Raising(Adapter):
    """Fails at one class."""

    def see(self, module, model):
        if type(module) is nn.ReLU:
            raise LookupError("of this one nothing is known")


@pytest.fixture
def asked(monkeypatch):
    """Frameworks with these adapters, the adapters, and what is reported."""
    monkeypatch.setattr(frameworks, "ADAPTERS", [Absent, Raising, Present])
    said: list[str] = []
    bridge = types.SimpleNamespace(faults_with=lambda *_: None, notice=said.append)
    names = [field.name for field in dataclasses.fields(Job)][5:]  # the callbacks
    faults = Faults(bridge)
    job = Job(bridge, faults, Meshes(), Layouts(), ParameterTaps(bridge, faults), **dict.fromkeys(names))
    found = Frameworks(job)
    found.watch(lambda names, then: None if any(name not in sys.modules for name in names) else then(), lambda f: f)
    return found, found._adapters, said


def test_each_module_is_shown_once_to_each_adapter_that_is_present(asked):
    found, (absent, _, present), said = asked
    shared = nn.ReLU()
    model = nn.Sequential(nn.Linear(2, 2), shared, torch.optim.swa_utils.AveragedModel(nn.Linear(2, 2)), shared)
    facts = found.look_at([module for _, module in naming.walk(model)], with_parameters=False)
    assert list(map(id, present.seen)) == list(map(id, model.modules()))
    assert absent.seen == [] and facts.wrapper == "Present"
    assert said == ["what Raising knows of a ReLU: LookupError: of this one nothing is known"]
    assert not facts.is_known, "there may be an axis that it would have stated"
    assert found.look_at([nn.Linear(2, 2)], with_parameters=False).is_known


def test_only_who_has_an_answer_is_asked(asked):
    found, adapters, _ = asked
    parameter = torch.ones(1)
    assert found.first("held_as", parameter, None)[0] is parameter
    assert found.first("placement_by_shape", torch.Size([1])) is None
    assert found.decided("read", parameter, 4, None) is NotImplemented
    assert [method.__self__ for method in found._who("see")] == adapters[1:]


def test_names_are_those_of_the_model_without_its_wrappers():
    inner = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    wrapped = nn.DataParallel(torch.optim.swa_utils.AveragedModel(inner))
    wrapped.other = nn.Tanh()  # what only a wrapper holds is none of the model's
    names = {name: module for name, module in naming.walk(wrapped) if name is not None}
    assert names == {"": wrapped.module.module, "0": wrapped.module.module[0], "1": wrapped.module.module[1]}
    assert len(naming.walk(wrapped)) == len(list(wrapped.modules()))


def test_a_module_that_is_there_twice_has_its_first_name():
    shared = nn.Linear(2, 2)
    model = nn.ModuleDict({"first": nn.Sequential(shared), "second": shared})
    assert [name for name, _ in naming.walk(model)] == ["", "first", "first.0"]


def test_an_adapter_is_a_file_and_a_line():
    files = {f"{frameworks.__name__}.{path.stem}" for path in FOLDER.glob("*.py")}
    listed = [adapter.__module__ for adapter in ADAPTERS]
    assert len(set(listed)) == len(listed)
    assert {*listed, f"{frameworks.__name__}.adapter", f"{frameworks.__name__}.__init__"} == files


def test_no_framework_is_imported():
    """Adapters wait until the job has imported it."""
    code = (
        "import sys, torch, unittest.mock; sys.modules['flexmodel_inside._bridge'] = unittest.mock.MagicMock();"
        "before = set(sys.modules); import flexmodel_inside.discovery;"
        "print(*sorted(n for n in set(sys.modules) - before if not n.startswith('flexmodel_inside')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=FOLDER.parent.parent, capture_output=True, text=True, timeout=120, check=True
    )
    named = {name for adapter in ADAPTERS for name in adapter.imports}
    packages = ("deepspeed", "megatron", "vllm", "torch.distributed.", "torch._dynamo", "transformers", "accelerate")
    assert [n for n in done.stdout.split() if n in named or n.startswith(packages)] == []
