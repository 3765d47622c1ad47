"""CUDA graphs that are made of modules. Whoever makes them refuses modules with hooks: ours are taken out meanwhile.
What is inside of such a graph is called no more, and so captured no more.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn

from .. import hooks
from ..naming import all_in, is_module
from ..patches import given, wrap
from .adapter import Adapter

# Modules that have `make_graphed_callables`; what is called with modules has an argument of one of these names.
_TORCH = ("torch.cuda.graphs", "torch.cuda")
_ENGINE = ("transformer_engine.pytorch.graph", "transformer_engine.pytorch")
_MAKES, _GIVEN = "make_graphed_callables", ("callables", "modules")
# megatron-core's own graphs are of its layers. Taps inside of these are refused while it captures them.
_MEGATRON, _MANAGER, _ASKS = "megatron.core.transformer.cuda_graphs", "CudaGraphManager", "call_ddp_preforward_hook"
# Names of modules that one line has.
_SHOWN = 3


class CudaGraphs(Adapter):
    """torch's, Transformer Engine's and megatron-core's ways to make them."""

    imports = _TORCH

    def watches(self) -> list[tuple[Sequence[str], Callable[[], object]]]:
        return [
            (_TORCH, lambda: self._follow(_TORCH)),
            (_ENGINE, lambda: self._follow(_ENGINE)),
            ((_MEGATRON,), self._follow_megatron),
        ]

    def _follow(self, names: Sequence[str]) -> None:
        for owner in map(sys.modules.get, names):
            if hasattr(owner, _MAKES):
                wrap(owner, _MAKES, self._hiding)

    def _hiding(self, original: Any) -> Any:
        take, give, tell = map(self.job.guard, (self._take_out, hooks.put_back, self._tell))

        def make_graphed_callables(*args: Any, **kwargs: Any) -> Any:
            graphed = args[0] if args else [kwargs.get(name) for name in _GIVEN]
            taken = take(graphed) or []
            try:
                made = original(*args, **kwargs)
            finally:
                give(taken)
            tell(graphed)
            return made

        return make_graphed_callables

    def _take_out(self, graphed: Any) -> Any:
        # A hook that came later would stay.
        self.job.settle()
        return hooks.take_out(_all_inside(graphed))

    def _tell(self, graphed: Any) -> None:
        """Says which taps are inside of graphs. The hooks of a graphed module itself are called as before."""
        outer = {id(module) for module in _modules(graphed)}
        inside = {id(m): m for m in _all_inside(graphed) if id(m) not in outer}
        names = sorted(name for m in inside.values() if (name := self.job.tapped_as(m)) is not None)
        if names:
            shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
            count = "1 tapped module is" if len(names) == 1 else f"{len(names)} tapped modules are"
            where = "inside of CUDA graphs that the job made of modules"
            self.job.bridge.notice(f"{count} {where}, and not captured where these are replayed: {shown}")

    def _follow_megatron(self) -> None:
        manager = getattr(sys.modules[_MEGATRON], _MANAGER, None)
        if not hasattr(manager, _ASKS):
            return

        def hiding(original: Any) -> Any:
            take, give = map(self.job.guard, (hooks.take_out, hooks.put_back))

            def call_ddp_preforward_hook(*args: Any, **kwargs: Any) -> Any:
                taken = take([given(args, kwargs, 1, "module")]) or []
                try:
                    return original(*args, **kwargs)
                finally:
                    give(taken)

            return call_ddp_preforward_hook

        wrap(manager, _ASKS, hiding)


def _modules(graphed: Any) -> Iterator[nn.Module]:
    """Those that are given to be graphed."""
    if is_module(graphed):
        yield graphed
    elif isinstance(graphed, (list, tuple)):
        for each in graphed:
            yield from _modules(each)


def _all_inside(graphed: Any) -> list[nn.Module]:
    """These, and all that are in them."""
    return [module for each in _modules(graphed) for module in all_in(each)]
