"""Our hooks on modules: how to recognize and hide them, and what keeps them out of copies, pickles and torch.jit."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from .naming import own
from .patches import follow, given, replace, undone, wrap

_KINDS = {
    "_forward_hooks": ("_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    "_forward_pre_hooks": ("_forward_pre_hooks_with_kwargs",),
}


class Traceable:
    """A hook for a torch whose graphs cannot have ours: it does nothing while torch.compile traces."""

    __name__ = "flexmodel"

    def __init__(self, hook: Any, module: nn.Module | None = None) -> None:
        self._hook = hook

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs or torch.compiler.is_compiling():
            return None
        return self._hook(*args)

    def __reduce__(self) -> Any:
        return self._hook.__reduce__()


def is_ours(hook: Any) -> bool:
    """Whether a hook is ours, or what ours became in a copy."""
    home = type(hook).__module__
    return (isinstance(home, str) and home.partition(".")[0] == __package__) or _is_copied(hook)


def _is_copied(hook: Any) -> bool:
    """See `reduce` in `cxx-bridge/cpp/tap.cc`."""
    return type(hook) is functools.partial and hook.func is sys.audit and hook.args == ("flexmodel.copied",)


def are_ours(module: nn.Module) -> bool:
    """Whether all hooks of a module are ours."""
    return all(is_ours(hook) for name in _KINDS for hook in own(module, name, {}).values())


def drop_strays(module: nn.Module) -> None:
    """Removes what our hooks became in a copy, and those that torch moved here from a module that it fused or
    converted. They do nothing, and every further copy would add to them."""
    for name in _KINDS:
        hooks = own(module, name, {})
        for key in [key for key, hook in hooks.items() if _is_copied(hook) or (is_ours(hook) and not _is_our_key(key))]:
            drop(module, name, key)


def _is_our_key(key: Any) -> bool:
    return type(key) is int and key < 0


def put(module: nn.Module, name: str, key: int, hook: Any, always_call: bool = False) -> None:
    """Adds `hook` in the attribute `name`, under a key of ours (`compiled.py` says why)."""
    if own(module, name, {}).get(key) is None:
        # Torch's own, whatever the module's class made of it.
        after = name == "_forward_hooks"
        register = nn.Module.register_forward_hook if after else nn.Module.register_forward_pre_hook
        number = register(module, hook, with_kwargs=True).id
        for kind in (name, _KINDS[name][0]):
            there = own(module, kind, {})
            there[key] = there.pop(number)
    else:
        own(module, name, {})[key] = hook
    if always_call:
        own(module, _KINDS[name][1], {})[key] = True
    _arrange(module, name)


def _arrange(module: nn.Module, name: str) -> None:
    """Has our hooks come after the job's, whose changes they have to see, and those that mark a pass around taps."""
    there = own(module, name, {})
    keys = [key for key in there if _is_our_key(key)]
    for key in sorted(keys, reverse=name == "_forward_hooks"):
        there.move_to_end(key)


def stay_last(guard: Callable[..., Any]) -> None:
    """Have our hooks come after those that the job adds from now on."""
    for name, register in (("_forward_hooks", "forward_hook"), ("_forward_pre_hooks", "forward_pre_hook")):

        def added(_: Any, args: tuple, kwargs: dict, name: str = name) -> None:
            _arrange(given(args, kwargs, 0, "self"), name)

        follow(nn.Module, f"register_{register}", guard, after=added)


def drop(module: nn.Module, name: str, key: int) -> None:
    """Removes the hook under `key` in the attribute `name`."""
    for kind in (name, *_KINDS[name]):
        own(module, kind, {}).pop(key, None)


def drop_all(modules: Iterable[nn.Module]) -> None:
    """Removes every hook of ours."""
    for module in modules:
        for name in _KINDS:
            for key in [key for key, hook in own(module, name, {}).items() if is_ours(hook)]:
                drop(module, name, key)


# Hooks of ours by key, with the module and the attribute that they were in.
_Taken = list[tuple[nn.Module, str, dict[Any, Any]]]


def take_out(modules: Iterable[nn.Module]) -> _Taken:
    """Removes our hooks, for `put_back`. What the job has of a module's hooks, such as a handle, stays good."""
    taken: _Taken = []
    for module in modules:
        for name in _KINDS:
            there = own(module, name, {})
            ours = {key: hook for key, hook in there.items() if is_ours(hook)}
            for key in ours:
                del there[key]
            if ours:
                taken.append((module, name, ours))
    return taken


def put_back(taken: _Taken) -> None:
    """Has hooks that were taken out where they were, unless taps are off since, or others of ours came."""
    if undone():
        return
    for module, name, ours in taken:
        there = own(module, name, {})
        for key, hook in ours.items():
            there.setdefault(key, hook)
        _arrange(module, name)


@contextlib.contextmanager
def hidden(modules: Iterable[nn.Module]) -> Iterator[None]:
    """While in it, our hooks are on none of the modules."""
    taken = take_out(modules)
    try:
        yield
    finally:
        put_back(taken)


def keep_from_copies(guard: Callable[..., Any]) -> None:
    """Leave our hooks out of pickles and copies of modules, which then work where there is no FlexModel.

    A class that defines by itself how it is copied may take them along: `drop_strays` is for these.
    """
    replace(nn.Module, "__reduce_ex__", _Reducing(guard(_without_ours)))


class _Reducing:
    """Finds the method that would be found without it, and removes our hooks from what that returns. `nn.Module` has
    none itself, so it is that of the next class in the method resolution order."""

    def __init__(self, clean: Callable[[Any], Any]) -> None:
        self._clean = clean

    def __get__(self, instance: nn.Module | None, owner: type | None = None) -> Any:
        found = super(nn.Module, owner if instance is None else instance).__reduce_ex__  # type: ignore[arg-type]
        if undone():
            return found
        clean = self._clean

        @functools.wraps(found)
        def __reduce_ex__(*args: Any, **kwargs: Any) -> Any:
            reduced = found(*args, **kwargs)
            return clean(reduced) or reduced

        __reduce_ex__.__module__ = getattr(found, "__module__", None)  # type: ignore[assignment]
        return __reduce_ex__


def _without_ours(value: Any) -> Any:
    """A module's state, or a tuple with one in it, without our hooks; `value` itself if it has none."""
    if type(value) is tuple:
        parts = tuple(map(_without_ours, value))
        return value if all(map(_same, parts, value)) else parts
    if not isinstance(value, dict):
        return value
    kept = {}
    for name, others in _KINDS.items():
        hooks = value.get(name)
        ours = {key for key, hook in hooks.items() if is_ours(hook)} if isinstance(hooks, dict) else ()
        for kind in (name, *others) if ours else ():
            hooks = value.get(kind)
            if isinstance(hooks, dict):
                kept[kind] = type(hooks)((key, each) for key, each in hooks.items() if key not in ours)
    if not kept:
        return value
    state = value.copy()
    state.update(kept)
    return state


def _same(one: object, other: object) -> bool:
    return one is other


def hide_from_jit(guard: Callable[..., Any]) -> None:
    """torch.jit.script compiles a module's hooks with it, and would refuse ours."""
    take, give = guard(take_out), guard(put_back)

    def hiding(original: Any) -> Any:
        def get_hook_stubs(*args: Any, **kwargs: Any) -> Any:
            taken = take([given(args, kwargs, 0, "nn_module")]) or []
            try:
                return original(*args, **kwargs)
            finally:
                give(taken)

        return get_hook_stubs

    wrap(torch.jit._recursive, "get_hook_stubs", hiding)
