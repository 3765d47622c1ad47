"""Fixtures of the end-to-end tests. Jobs are expensive: one run serves every test that asks for it, in any process."""

import contextlib
import fcntl
import hashlib
import json
import pathlib
import signal
import sys
import types
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch

sys.path[:0] = [str(pathlib.Path(__file__).parent), str(pathlib.Path(__file__).parent / "programs")]

import untapped as untapped_jobs

import harness


class Bridge(types.ModuleType):
    """Stands for the bridge's module, for tests that import what runs in jobs: every code is a number of its own."""

    def __getattr__(self, name: str) -> int:
        if not name.isupper():
            raise AttributeError(name)
        if name == "PLACEMENTS_OF_PIECES":
            return 1 << self.PLACEMENT_SHARD | 1 << self.PLACEMENT_HEAD_TAIL
        return self.__dict__.setdefault(name, len(self.__dict__))


sys.modules["flexmodel_inside._bridge"] = Bridge("flexmodel_inside._bridge")
torch.set_num_threads(1)  # as in the jobs: the references are compared bit by bit


def pytest_configure(config: pytest.Config) -> None:
    """Says early that there is nothing to test."""
    if not harness.LIBRARY.is_file() or not pathlib.Path(harness.FLEXMODEL).is_file():
        raise pytest.UsageError(f"{harness.VENV} has no FlexModel in it: run scripts/setup --test")
    if not hasattr(config, "workerinput"):
        harness.remove_stale_locks()
    # What is ignored here (under nohup) the jobs would ignore too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    """No fixture hangs for ever."""
    with harness.bounded():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """No test hangs for ever."""
    with harness.bounded():
        return (yield)


class Shared:
    """Outcomes of jobs in a folder that all of pytest's processes see: whoever asks first runs the job."""

    def __init__(self, folder: pathlib.Path) -> None:
        self._folder = folder
        self._known: dict[str, harness.Outcome] = {}

    def once(self, key: Sequence[str], run: Callable[[pathlib.Path], harness.Outcome]) -> harness.Outcome:
        """What `run` returned, which is given a path where nothing is."""
        name = hashlib.sha256("\0".join(key).encode(errors="surrogatepass")).hexdigest()[:16]
        if name not in self._known:
            folder = self._folder / name
            with self._alone(name):
                if not (folder / "outcome.json").exists():
                    folder.mkdir(parents=True, exist_ok=True)
                    outcome = run(folder / "x")
                    (folder / "outcome.json").write_text(json.dumps([outcome.code, outcome.out, outcome.err]))
                code, out, err = json.loads((folder / "outcome.json").read_text())
            self._known[name] = harness.Outcome(code, out, err, folder / "x")
        return self._known[name]

    @contextlib.contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        self._folder.mkdir(exist_ok=True)
        with open(self._folder / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


@pytest.fixture(scope="session")
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Shared:
    """The folder of outcomes of this session."""
    base = tmp_path_factory.getbasetemp()
    return Shared((base.parent if hasattr(request.config, "workerinput") else base) / "shared")


@pytest.fixture(scope="session")
def run_once(shared: Shared):
    """Runs a tapped job the first time that anybody asks for it."""

    def once(argv: list[str], hooks: str, *options: str, **env: str) -> harness.Outcome:
        key = ["tapped", *argv, hooks, *options, *(f"{name}={value}" for name, value in sorted(env.items()))]
        return shared.once(key, lambda out: harness.tapped(argv, hooks, out, *options, **env))

    return once


@pytest.fixture(scope="session")
def untapped() -> Iterator[untapped_jobs.Server]:
    """Runs jobs without FlexModel."""
    server = untapped_jobs.Server()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def untapped_once(shared: Shared, untapped: untapped_jobs.Server):
    """The outcome of a job without FlexModel, run the first time that anybody asks for it, however it is launched."""

    def once(argv: list[str]) -> harness.Outcome:
        ranks, program = harness.program_of(argv)
        return shared.once(["untapped", str(ranks), *program], lambda _: untapped.run(argv)).expect(0)

    return once
