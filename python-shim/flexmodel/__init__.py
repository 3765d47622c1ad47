"""Read what FlexModel captured of a job: whole tensors, by the names of the model as it was written.

    import flexmodel

    run = flexmodel.open("runs/x")
    run.modules                                  # ['layers.0.mlp', ...]
    t = run.get("layers.3.mlp", step=4)          # the whole tensor: torch.Tensor if torch is installed, else numpy
    for rec in run["layers.3.mlp"]:
        print(rec, rec.tensor().shape)

torch is imported when the first tensor is asked for, and not before.
"""

from ._errors import NotCapturedError, RunError, RunNotFoundError
from ._record import Record
from ._run import Run
from ._run import open_run as open
from ._types import (
    Axis,
    Divergence,
    Dropped,
    Job,
    ModelInfo,
    ModuleInfo,
    Part,
    Refusal,
    Revision,
    RunInfo,
    Stats,
    Totals,
)

__version__ = "0.1.0"

__all__ = [
    "Axis",
    "Divergence",
    "Dropped",
    "Job",
    "ModelInfo",
    "ModuleInfo",
    "NotCapturedError",
    "Part",
    "Record",
    "Refusal",
    "Revision",
    "Run",
    "RunError",
    "RunInfo",
    "RunNotFoundError",
    "Stats",
    "Totals",
    "open",
]
