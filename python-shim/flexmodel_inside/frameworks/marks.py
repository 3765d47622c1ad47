"""megatron's marks on parameters, which others make too: which of its dimensions a tensor parallel layer has cut."""

from __future__ import annotations

import torch

from .._bridge import PLACEMENT_SHARD as SHARD
from .._bridge import PLACEMENT_UNKNOWN as UNKNOWN
from ..layouts import AxisPlacement
from ..mesh import TENSOR
from .adapter import Adapter, ModelFacts


class Marks(Adapter):
    """There is no module to wait for."""

    def parameter_placement(self, parameter: torch.Tensor, model: ModelFacts) -> list[AxisPlacement] | None:
        if not getattr(parameter, "tensor_model_parallel", False):
            return None
        # DeepSpeed has the mark too, and says nothing of the dimension.
        dim = getattr(parameter, "partition_dim", None)
        known = isinstance(dim, int) and 0 <= dim < parameter.dim()
        place = (SHARD, dim) if known else (UNKNOWN, 0)
        return [axis.placed(*place) for axis in model.mesh if axis.role == TENSOR]
