"""torch.compile: once it is in use, every hook of ours has to be something that it can trace."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .adapter import Adapter

_MODULE = "torch._dynamo"


class Compiler(Adapter):
    """`../compiled.py` has what hooks are in graphs, `../compiler.py` what torch has to know of them."""

    imports = (_MODULE,)

    def watches(self) -> list[tuple[Sequence[str], Callable[[], object]]]:
        return [((_MODULE,), self.job.compiler_is_here)]
