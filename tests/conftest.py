"""Fixtures of the end-to-end tests. Jobs are expensive: one run serves every test of its module."""

import pathlib
import signal
import sys
import types

import pytest
import torch

sys.path[:0] = [str(pathlib.Path(__file__).parent), str(pathlib.Path(__file__).parent / "programs")]

import harness


class Bridge(types.ModuleType):
    """Stands for the bridge's module, for tests that import what runs in jobs: every code is a number of its own."""

    def __getattr__(self, name: str) -> int:
        if not name.isupper():
            raise AttributeError(name)
        return self.__dict__.setdefault(name, len(self.__dict__))


sys.modules["flexmodel_inside._bridge"] = Bridge("flexmodel_inside._bridge")
torch.set_num_threads(1)  # as in the jobs: the references are compared bit by bit


def pytest_configure(config: pytest.Config) -> None:
    """Says early that there is nothing to test."""
    if not harness.LIBRARY.is_file() or not pathlib.Path(harness.FLEXMODEL).is_file():
        raise pytest.UsageError(f"{harness.VENV} has no FlexModel in it: run scripts/setup --test")
    # What is ignored here (under nohup) the jobs would ignore too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def run_once(tmp_path_factory: pytest.TempPathFactory):
    """Runs a tapped job the first time it is asked for, and returns the same outcome afterwards."""
    done: dict[tuple, harness.Outcome] = {}

    def once(argv: list[str], hooks: str, *options: str, **env: str) -> harness.Outcome:
        key = (*argv, hooks, *options, *sorted(env.items()))
        if key not in done:
            done[key] = harness.tapped(argv, hooks, tmp_path_factory.mktemp("run") / "x", *options, **env)
        return done[key]

    return once


@pytest.fixture(scope="session")
def untapped_once():
    """The same for jobs without FlexModel."""
    done: dict[tuple, harness.Outcome] = {}

    def once(argv: list[str]) -> harness.Outcome:
        if tuple(argv) not in done:
            done[tuple(argv)] = harness.run(argv).expect(0)
        return done[tuple(argv)]

    return once
