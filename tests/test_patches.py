"""What we replaced in torch can be listed, and is undone where taps are switched off by a fault."""

import math
import types

import pytest
from flexmodel_inside.patches import Patches
from undone import WRAPPED

import harness


class Base:
    def inherited(self):
        return "inherited"


class Owner(Base):
    def method(self, value, *, more=0):
        """Adds."""
        return value + more

    @staticmethod
    def static():
        return "static"


@pytest.fixture
def owner() -> type:
    """A class that the test may change."""
    return type("Owner", (Base,), dict(vars(Owner)))


def shouting(original):
    return lambda *args, **kwargs: f"{original(*args, **kwargs)}!"


@pytest.mark.parametrize("name", ["method", "static", "inherited"])
def test_an_undone_name_is_what_it_was(owner, name):
    before, patches = dict(vars(owner)), Patches()
    args = (1,) if name == "method" else ()
    was = getattr(owner(), name)(*args)
    patches.wrap(owner, name, shouting)
    assert getattr(owner(), name)(*args) == f"{was}!"
    assert [patch.state for patch in patches.made()] == ["ours"]
    patches.undo()
    assert dict(vars(owner)) == before and getattr(owner(), name)(*args) == was
    assert [patch.state for patch in patches.made()] == ["original"]


def test_names_of_modules_and_objects_are_undone_too(owner):
    module, thing, patches = types.ModuleType("somewhere"), owner(), Patches()
    module.function = math.sqrt
    patches.wrap(module, "function", shouting)
    patches.wrap(thing, "method", shouting)
    assert (module.function(4), thing.method(1, more=2)) == ("2.0!", "3!")
    assert [str(patch) for patch in patches.made()] == ["somewhere.function: ours", f"{__name__}.Owner.method: ours"]
    patches.undo()
    assert module.function is math.sqrt and vars(thing) == {}


def test_what_was_replaced_twice_is_undone_at_once(owner):
    original, patches = owner.method, Patches()
    patches.wrap(owner, "method", shouting)
    patches.wrap(owner, "method", shouting)
    assert owner().method(1) == "1!!" and len(patches.made()) == 1
    patches.undo()
    assert owner.method is original


def test_what_the_job_wrapped_since_stays_and_passes_through(owner):
    patches, seen = Patches(), []
    patches.follow(owner, "method", lambda function, _: function, before=lambda args, kwargs: seen.append(kwargs))
    ours = owner.method
    owner.method = lambda self, *args, **kwargs: 10 * ours(self, *args, **kwargs)
    assert owner().method(1, more=2) == 30 and seen == [{"more": 2}]
    patches.undo()
    assert owner().method(1, more=2) == 30 and seen == [{"more": 2}]
    assert [patch.state for patch in patches.made()] == ["wrapped"]


def test_nothing_is_replaced_after_it_was_undone(owner):
    before, patches = dict(vars(owner)), Patches()
    prepared = patches.prepare(owner, "method", shouting(owner.method))
    undone = []
    patches.also_undo(lambda: undone.append(1))
    patches.undo()
    patches.undo()
    prepared.put()
    patches.wrap(owner, "static", shouting)
    assert dict(vars(owner)) == before and undone == [1]


def test_an_owner_that_takes_nothing_back_passes_through(owner):
    class Fixed(type):
        fixed = False

        def __setattr__(cls, name, value):
            if cls.fixed:
                raise TypeError("no more")
            super().__setattr__(name, value)

    stubborn, patches = Fixed("Stubborn", (), dict(vars(Owner))), Patches()
    patches.wrap(stubborn, "method", shouting)
    patches.wrap(owner, "method", shouting)
    Fixed.fixed = True
    original = Owner.method
    patches.undo()
    assert stubborn().method(1) == 1 and owner.method is original


def test_a_stand_in_looks_like_the_original(owner):
    original = owner.method
    Patches().wrap(owner, "method", shouting)
    assert owner.method.__doc__ == "Adds." and owner.method.__wrapped__ is original


@pytest.mark.parametrize("how", ["python", "engine", "engine in inference"])
def test_a_fault_gives_torch_back(how, run_once, untapped_once, tmp_path):
    ways = {"python": ["fail"], "engine": [], "engine in inference": ["infer"]}
    argv = harness.python("undone.py", str(tmp_path / "report"), *ways[how])
    fault = {} if how == "python" else {"FLEXMODEL_TEST_FAULT": "panic-in-tap"}
    outcome = run_once(argv, "**:forward,backward,param,grad", **fault).expect(0)
    assert "taps are off in this process" in outcome.err
    lines = (tmp_path / "report").read_text().splitlines()
    assert outcome.out == untapped_once(argv).out
    states = dict(line.removeprefix("patch ").rsplit(": ", 1) for line in lines if line.startswith("patch "))
    wrapped = {name for name, state in states.items() if state != "original"}
    assert wrapped == {f"{owner.__module__}.{owner.__qualname__}.{name}" for owner, name in WRAPPED}
    assert len(states) > 20, states
    assert [line for line in lines if line.startswith("follower ")] == []
    taps = [int(n) for n in lines[-1].split()[1:]]
    assert taps[2:] == [0, 0], "no graph that is made afterwards has a tap"
    assert how != "python" or taps[1] > 0
