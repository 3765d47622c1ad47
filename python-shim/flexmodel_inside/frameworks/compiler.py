"""torch.compile: once it is in use, every hook of ours has to be something that it can trace, and in no CUDA graph."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from ..patches import given, wrap
from .adapter import Adapter

_MODULE = "torch._dynamo"
_SCHEDULER = "torch._inductor.scheduler"
_CUTS = "should_partition"


class Compiler(Adapter):
    """`../compiled.py` has what hooks are in graphs, `../compiler.py` what torch has to know of them."""

    imports = (_MODULE,)

    def watches(self) -> list[tuple[Sequence[str], Callable[[], object]]]:
        return [((_MODULE,), self.job.compiler_is_here), ((_MODULE, _SCHEDULER), self._cut)]

    def _cut(self) -> None:
        """What inductor puts into a CUDA graph ends before each of our operations, and begins behind it. Its option for
        that (`custom_should_partition_ops`) is in the keys of all graphs that it saves, also of those without taps."""
        scheduler = sys.modules[_SCHEDULER].Scheduler  # type: ignore[attr-defined]
        if not hasattr(scheduler, _CUTS):
            return

        def cutting(original: Any) -> Any:
            def should_partition(*args: Any, **kwargs: Any) -> Any:
                return _reason(given(args, kwargs, 1, "node")) or original(*args, **kwargs)

            return should_partition

        wrap(scheduler, _CUTS, cutting)


def _reason(node: Any) -> str | None:
    """Why one of inductor's nodes is in no CUDA graph; None if it is none of our operations."""
    operation = getattr(getattr(node, "node", None), "op_overload", None)
    return f"a tap: {operation}" if getattr(operation, "namespace", None) == "flexmodel" else None
