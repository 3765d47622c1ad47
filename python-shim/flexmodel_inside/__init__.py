"""FlexModel inside a job: finds models, names their modules, registers taps. Started by libflexmodel.so.

| file | does |
|---|---|
| `imports.py` | tells when a module of torch has been imported |
| `patches.py` | everything that we replaced in torch, which can be listed and undone |
| `faults.py` | what one parameter, module or tensor costs that raises |
| `family.py` | knows every module from construction on, and which are in no other |
| `hooks.py` | our hooks on modules, and who must not see them |
| `compiler.py` | has torch.compile know our operations, and mends what it does wrong with them |
| `caches.py` | keeps what of ours is in graphs out of what others load |
| `compiled.py` | what these hooks are in graphs of torch.compile |
| `alike.py` | makes modules that may share a graph alike in their hooks |
| `naming.py` | the names the user wrote, without those of wrappers |
| `wrappers.py` | how the job wraps a model |
| `mesh.py` | the axes along which it distributes a model |
| `layouts.py` | how a tensor lies along them, where torch knows |
| `contexts.py` | how torch's context parallelism cuts sequences |
| `pipelines.py` | the stages of pipelines, and their microbatches |
| `parameters.py` | the pieces of parameters and gradients that this process holds |
| `steps.py` | what the step of an optimizer is given |
| `models.py` | finds models when they are first called, and taps them |
| `communicators.py` | a communicator of our own, to gather tensors |
| `scaling.py` | by how much the job scales losses |
| `ranks.py` | who this process is |

It decides nothing that Rust decides too: which modules are tapped, and what a tap does, is asked of the interposer.
What one of many raises costs that one (`faults.py`). Any other exception in here turns taps off in this process; the
job goes on.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

from . import imports, patches
from .faults import reason


def start(bridge: Any) -> None:
    """Wait for `torch.nn` and `torch.optim`, then watch for models.

    `bridge` is the module that `cxx-bridge/cpp/module.cc` makes. It is imported as `flexmodel_inside._bridge`,
    and has the codes that we share with Rust (`wire/src/codes.rs`) as constants.
    """
    sys.modules[bridge.__name__] = bridge

    def watch() -> None:
        from . import contexts, layouts, mesh, pipelines
        from .models import Models
        from .ranks import JOINING
        from .scaling import DEEPSPEED

        models = Models(bridge)
        models.watch()
        imports.when_imported(["torch._dynamo"], guarded(bridge, models.dynamo_is_here))
        imports.when_imported([mesh.MODULE], guarded(bridge, models.meshes_are_here))
        imports.when_imported([layouts.MODULE], guarded(bridge, models.dtensor_is_here))
        imports.when_imported([contexts.MODULE], guarded(bridge, models.contexts_are_here))
        imports.when_imported([pipelines.TORCH], guarded(bridge, models.pipelining_is_here))
        imports.when_imported([pipelines.MEGATRON], guarded(bridge, models.megatron_is_here))
        imports.when_imported([DEEPSPEED], guarded(bridge, models.deepspeed_is_here))
        imports.when_imported(JOINING, guarded(bridge, models.distributed_is_here))

    imports.when_imported(["torch.nn.modules.module", "torch.optim.optimizer"], guarded(bridge, watch))


def guarded(bridge: Any, function: Any, name: str = "") -> Any:
    """`function`, so that an exception in it turns taps off instead of reaching the job. `name` says what it was."""
    name = name or function.__qualname__

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        try:
            return function(*args)
        except BaseException as e:
            why = reason(e)
            if why is None:
                raise
            bridge.fault(f"{name}: {why}")
            patches.undo()
            return None

    return call
