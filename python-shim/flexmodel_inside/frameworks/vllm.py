"""vLLM, which keeps graphs that torch.compile made for it: what of ours is in them is a part of their key."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from ..patches import wrap
from .adapter import Adapter

_MODULE = "vllm.envs"


class Vllm(Adapter):
    """Its keys are digests of its settings, and of the files that torch.compile read."""

    imports = (_MODULE,)

    def watches(self) -> list[tuple[Sequence[str], Callable[[], object]]]:
        return [((_MODULE, "torch._dynamo"), self._follow)]

    def _follow(self) -> None:
        caches = self.job.caches()
        if caches is None:
            return

        def keyed(original: Any) -> Any:
            def compile_factors(*args: Any, **kwargs: Any) -> Any:
                factors, ours = original(*args, **kwargs), caches.key()
                return factors if ours is None else {**factors, "FLEXMODEL": ours}

            return compile_factors

        wrap(sys.modules[_MODULE], "compile_factors", keyed)
        caches.is_keyed = True
