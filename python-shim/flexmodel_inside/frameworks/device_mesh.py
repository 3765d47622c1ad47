"""The device meshes that the job makes: the names of their axes say what wrappers that use them do not."""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from ..patches import follow, given
from .adapter import Adapter, Job, ModelFacts

_MODULE = "torch.distributed.device_mesh"


class DeviceMeshes(Adapter):
    """Notes every mesh, and adds what the whole of one says to what a model says of a part of it."""

    imports = (_MODULE,)

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        # In the order in which the job made them.
        self._made: list[weakref.ref[Any]] = []

    def watches(self) -> list[tuple[Sequence[str], Callable[[], object]]]:
        return [((_MODULE,), self._follow)]

    def _follow(self) -> None:
        made = self._made
        follow(
            sys.modules[_MODULE].DeviceMesh,  # type: ignore[attr-defined]
            "__init__",
            self.job.guard,
            after=lambda _, *call: made.append(weakref.ref(given(*call, 0, "self"))),
        )

    def begin(self, model: ModelFacts) -> None:
        """Names the axes of meshes that were made since the last time."""
        while self._made:
            mesh = self._made.pop(0)()
            if mesh is not None:
                self.job.faults.of("a device mesh", self._meet, mesh)

    def _meet(self, mesh: Any) -> None:
        if getattr(mesh, "mesh_dim_names", None):
            axes = self.job.meshes.axes_of(mesh)
            if math.prod(axis.size for axis in axes) == sys.modules["torch.distributed"].get_world_size():
                self.job.meshes.whole.append([axis for axis in axes if axis.size > 1])

    def conclude(self, model: ModelFacts) -> None:
        for mesh in model.meshes:
            model.axes += axes_of_root(self.job, mesh)


def axes_of_root(job: Job, mesh: Any) -> list[Any]:
    """The axes of the mesh that a mesh was sliced from, if they have names."""
    root = getattr(mesh, "_get_root_mesh", lambda: mesh)()
    return job.meshes.axes_of(root) if root.mesh_dim_names else []
