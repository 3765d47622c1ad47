"""Everything that we replaced in torch and in what is built on it: it can be listed, and undone.

A stand-in calls the original with whatever it is given, and gives back, or raises, what that does. It has the name, the
documentation and the signature of the original. Hooks that torch offers are not replaced things, and are not here.

`undo` is for a process whose taps went off by a fault. A name that is still ours becomes the original again. Where the
job has wrapped ours since, ours has to stay: it then passes every call on and does nothing else.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

# What a namespace has of a name that it inherits.
_INHERITED = object()


class Patch:
    """One replaced name: an attribute of a module, a class or an object."""

    def __init__(self, patches: Patches, owner: Any, name: str, ours: Any) -> None:
        self._patches = patches
        self.owner = owner
        self.name = name
        # As the owner's own namespace has it: a static method is the object that is one.
        self.original = vars(owner).get(name, _INHERITED)
        self.ours = staticmethod(ours) if isinstance(self.original, staticmethod) else ours

    def put(self) -> None:
        """Replace the original. What somebody else put in its place stays."""
        if self._now() is self.original and not self._patches.undone:
            setattr(self.owner, self.name, self.ours)

    def stack(self, ours: Any) -> None:
        """Replace what is ours by more of ours."""
        self.ours = staticmethod(ours) if isinstance(self.original, staticmethod) else ours
        setattr(self.owner, self.name, self.ours)

    def restore(self) -> None:
        """Put the original back. What somebody else put in the place of ours stays."""
        if self._now() is not self.ours:
            return
        if self.original is _INHERITED:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self.original)

    @property
    def state(self) -> str:
        """`ours`, `original` or `wrapped`: what the name is now."""
        now = self._now()
        return "ours" if now is self.ours else "original" if now is self.original else "wrapped"

    def __str__(self) -> str:
        cls = self.owner if isinstance(self.owner, type) else type(self.owner)
        owner = self.owner.__name__ if hasattr(self.owner, "__spec__") else f"{cls.__module__}.{cls.__qualname__}"
        return f"{owner}.{self.name}: {self.state}"

    def _now(self) -> Any:
        return vars(self.owner).get(self.name, _INHERITED)


class Patches:
    """All replacements, in the order in which they were made."""

    def __init__(self) -> None:
        self.undone = False
        self._made: list[Patch] = []
        self._also: list[Callable[[], object]] = []

    def made(self) -> list[Patch]:
        """Each of them; as a string it is a line for people."""
        return list(self._made)

    def undo(self) -> None:
        """Put back what is still ours, and have the rest pass through. For good: nothing is replaced afterwards."""
        if self.undone:
            return
        self.undone = True
        for restore in (*(patch.restore for patch in reversed(self._made)), *self._also):
            try:
                restore()
            except Exception:  # an owner that the job made read-only: ours passes through
                continue

    def also_undo(self, function: Callable[[], object]) -> None:
        """Call `function` when everything is undone."""
        self._also.append(function)

    def prepare(self, owner: Any, name: str, ours: Any) -> Patch:
        """A replacement that is put and restored by its owner. `ours` has to pass through where `undone` says so."""
        patch = Patch(self, owner, name, ours)
        self._made.append(patch)
        return patch

    def replace(self, owner: Any, name: str, ours: Any) -> None:
        """As `prepare`, put at once. Where ours is there already, there is one replacement still."""
        if self.undone:
            return
        there = [patch for patch in self._made if patch.owner is owner and patch.name == name and patch.state == "ours"]
        if there:
            there[0].stack(ours)
        else:
            self.prepare(owner, name, ours).put()

    def wrap(self, owner: Any, name: str, make: Callable[[Any], Callable[..., Any]]) -> None:
        """Replace a function by what `make` makes of it."""
        original = getattr(owner, name)
        ours = make(original)

        @functools.wraps(original)
        def stand_in(*args: Any, **kwargs: Any) -> Any:
            return original(*args, **kwargs) if self.undone else ours(*args, **kwargs)

        self.replace(owner, name, stand_in)

    def follow(
        self,
        owner: Any,
        name: str,
        guard: Callable[..., Any],
        before: Callable[[tuple, dict], object] | None = None,
        after: Callable[[Any, tuple, dict], object] | None = None,
    ) -> None:
        """Call `before` with the positional and the keyword arguments of a function, and `after` with its result and
        these. `guard` makes of each a function that raises nothing, and reports what did by a name."""

        def make(original: Any) -> Callable[..., Any]:
            what = f"following {getattr(original, '__qualname__', name)}"
            begin, end = (None if each is None else guard(each, what) for each in (before, after))

            def follower(*args: Any, **kwargs: Any) -> Any:
                if begin is not None:
                    begin(args, kwargs)
                result = original(*args, **kwargs)
                if end is not None:
                    end(result, args, kwargs)
                return result

            return follower

        self.wrap(owner, name, make)


def given(args: tuple, kwargs: dict, index: int, name: str, otherwise: Any = None) -> Any:
    """An argument, whichever way it came."""
    return args[index] if len(args) > index else kwargs.get(name, otherwise)


# Those of this process.
_PATCHES = Patches()

also_undo, follow, made, prepare, replace, undo, wrap = (
    _PATCHES.also_undo,
    _PATCHES.follow,
    _PATCHES.made,
    _PATCHES.prepare,
    _PATCHES.replace,
    _PATCHES.undo,
    _PATCHES.wrap,
)


def undone() -> bool:
    """Whether everything was undone."""
    return _PATCHES.undone
