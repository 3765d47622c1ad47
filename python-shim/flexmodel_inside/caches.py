"""Keeps what torch.compile saves for later processes apart from what of ours is in a graph.

A graph with a tap in it is in neither of torch's caches that are asked by a graph (FX graph cache, AOTAutograd's): our
operations are effects, and torch takes no graph with effects. All others of a tapped job have the keys that they have
everywhere. Here are the caches that are asked before there is a graph, by a key which knows nothing of hooks:

| cache | |
|---|---|
| torch's precompiled packages (`torch._dynamo.config.caching_precompile`) | have the job's hooks in their keys |
| vLLM's compiled graphs and models | have them too, as one of its factors (`frameworks/vllm.py`) |
| functions compiled ahead of time (`aot_compile`), where the job chooses the place | are made without our hooks |
"""

from __future__ import annotations

import functools
import hashlib
import os
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from . import hooks, imports
from .patches import follow, wrap

_OPERATIONS = ("tap", "gradient", "factors", "forward_pass")


class Caches:
    """The caches of a process in which torch.compile knows our operations.

    `settle` puts hooks in place that modules still lack, and `modules` are all there are. `guarded` makes of a function
    one that turns taps off where it raises.
    """

    def __init__(
        self,
        bridge: Any,
        settle: Callable[[], object],
        modules: Callable[[], Iterable[nn.Module]],
        guarded: Callable[..., Any],
    ) -> None:
        self._bridge = bridge
        self._settle = guarded(settle)
        self._guarded = guarded
        self._modules = modules
        self._text = os.environ.get("FLEXMODEL_HOOKS", "")
        # Whether what is compiled ahead of time goes to places of which we are a part.
        self.is_keyed = False
        # What is to be in a key; None where nothing can be tapped.
        self.key: Callable[[], str | None] = guarded(self._key)
        self._said = False

    def watch(self) -> None:
        """Follow each of them, once it is imported."""
        for name, watch in (
            ("torch._dynamo.package", self._follow_packages),
            ("torch._dynamo.aot_compile", self._follow_ahead_of_time),
        ):
            imports.when_imported([name], self._guarded(watch))

    @functools.cached_property
    def _ours(self) -> str:
        """A digest of what a graph of this job may have of ours: what is in it by these sources, for these hooks."""
        digest = hashlib.sha256(self._text.encode(errors="surrogateescape"))
        for name in _OPERATIONS:
            digest.update(str(getattr(torch.ops.flexmodel, name).default._schema).encode())
        digest.update(str(self._bridge.call_words).encode())
        for path in sorted(pathlib.Path(__file__).parent.rglob("*.py")):
            digest.update(path.read_bytes())
        return digest.hexdigest()

    def _key(self) -> str | None:
        return self._ours if self._bridge.active() else None

    def _follow_packages(self) -> None:
        """They are looked up by the name of a function, when that is decorated: it may then call models that are yet to
        be made."""

        def keyed(original: Any) -> Any:
            def source_id_from_fn(*args: Any, **kwargs: Any) -> str:
                found, ours = original(*args, **kwargs), self.key()
                return found if ours is None else hashlib.sha256(f"{found} {ours}".encode()).hexdigest()

            return source_id_from_fn

        wrap(torch._dynamo.package.CompilePackage, "source_id_from_fn", keyed)

    def _follow_ahead_of_time(self) -> None:
        """What is saved there is loaded where we are not."""
        ahead = torch._dynamo.aot_compile

        def hiding(original: Any) -> Any:
            def aot_compile_fullgraph(*args: Any, **kwargs: Any) -> Any:
                self._settle()
                with hooks.hidden([] if self.is_keyed else self._modules()):
                    return original(*args, **kwargs)

            return aot_compile_fullgraph

        wrap(ahead, "aot_compile_fullgraph", hiding)
        follow(ahead.AOTCompiledFunction, "__post_init__", self._guarded, after=lambda *_: self._tell())

    def _tell(self) -> None:
        if self._bridge.active() and not self.is_keyed and not self._said:
            self._said = True
            self._bridge.notice(
                "modules inside what is compiled ahead of time (aot_compile) are not captured, since that is saved for "
                "jobs without taps; torch.compile by itself is captured"
            )
