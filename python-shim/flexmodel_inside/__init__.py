"""FlexModel inside a job: finds models, names their modules, registers taps. Started by libflexmodel.so.

| file | does |
|---|---|
| `imports.py` | calls back when the job has imported a module |
| `patches.py` | lists and undoes everything that we replaced in torch and others |
| `faults.py` | has one parameter, module or tensor that raises cost itself alone |
| `discovery.py` | finds models when they are first called |
| `module_registry.py` | knows every live module from construction on, and which are roots |
| `naming.py` | the names the user wrote, without those of wrappers; the one walk through a model |
| `frameworks/` | what each framework says of a model: one file each |
| `mesh.py` | the axes along which a job distributes a model |
| `layouts.py` | how a tensor lies along them |
| `orders.py` | where modules say that the batch is |
| `tapping.py` | puts taps on modules |
| `hooks.py` | our hooks on modules, and who must not see them |
| `parameters.py` | the pieces of parameters and gradients that this process holds, and their taps |
| `clock.py` | what ends a step of the job |
| `holders.py` | which optimizers hold the parameters of which taps |
| `steps.py` | what the step of an optimizer is given |
| `compiled.py` | what our hooks are in graphs of torch.compile |
| `compiler.py` | has torch.compile know our operations, and mends what it does wrong with them |
| `graphs.py` | has graphs made anew whose modules get other hooks, where the job lets it |
| `caches.py` | keeps what of ours is in graphs out of what others load |
| `uniform_hooks.py` | gives modules that may share a graph the same hooks |
| `communicators.py` | a communicator of our own, to gather tensors |
| `ranks.py` | who this process is, and of which process group |

It decides nothing that Rust decides too: which modules are tapped, and what a tap does, is asked of the interposer.
What one of many raises costs that one (`faults.py`). Any other exception in here turns taps off in this process, and
undoes what we replaced; the job goes on.
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
        from .discovery import Discovery

        Discovery(bridge).watch()

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
