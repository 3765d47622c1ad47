"""What a program's modules compute, recorded in one process with plain PyTorch hooks.

Keys are `Key(module, kind, path, step, micro, call, train)`. Gradients are taken with tensor hooks, on an alias of each
input (so that only the path through the module counts, as in `register_full_backward_hook`) and on each output; unlike
that hook they tell calls apart and stand in-place operations.
"""

import dataclasses
from collections import defaultdict
from typing import Any, NamedTuple

import torch


class Key(NamedTuple):
    """Which tensor."""

    module: str
    kind: str
    path: str
    step: int
    micro: int = 0
    call: int = 0
    train: bool = True


def leaves(value: Any, path: str):
    """The tensors in `value`, each with its path."""
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from leaves(item, f"{path}.{name}")
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from leaves(getattr(value, field.name), f"{path}.{field.name}")
    elif hasattr(value, "_fields"):
        for name in value._fields:
            yield from leaves(getattr(value, name), f"{path}.{name}")
    elif isinstance(value, tuple | list):
        for index, item in enumerate(value):
            yield from leaves(item, f"{path}[{index}]")


def alias(value: Any) -> Any:
    """The same structure with every differentiable tensor replaced by an alias of itself."""
    if isinstance(value, torch.Tensor):
        return value.view_as(value) if value.requires_grad else value
    if isinstance(value, dict):
        return type(value)(**{k: alias(v) for k, v in value.items()})
    if dataclasses.is_dataclass(value):
        return dataclasses.replace(value, **{f.name: alias(getattr(value, f.name)) for f in dataclasses.fields(value)})
    if hasattr(value, "_fields"):
        return type(value)(*map(alias, value))
    if isinstance(value, tuple | list):
        return type(value)(map(alias, value))
    return value


class Recorder:
    """Records the modules of one model that `wanted(name)` accepts."""

    def __init__(self, model: torch.nn.Module, wanted):
        self.found: dict[Key, torch.Tensor] = {}
        self.at = (0, 0, True)
        self.calls: dict[str, int] = defaultdict(int)
        for name, module in model.named_modules():
            if wanted(name):
                module.register_forward_pre_hook(self._before(name), with_kwargs=True)
                module.register_forward_hook(self._after(name))

    def forward_pass(self, step: int, micro: int = 0, train: bool = True) -> None:
        """Says which forward pass comes next."""
        self.at = (step, micro, train)
        self.calls.clear()

    def _key(self, name: str, kind: str, path: str, call: int) -> Key:
        step, micro, train = self.at
        return Key(name, kind, path, step, micro, call, train)

    def _take(self, key: Key, value: torch.Tensor) -> None:
        assert key not in self.found, key
        self.found[key] = value.detach().clone()

    def _watch(self, name: str, kind: str, path: str, call: int, value: torch.Tensor) -> None:
        # A parameter that a module gives away would keep the hook for the next step.
        if value.requires_grad and not value.is_leaf:
            key = self._key(name, kind, path, call)
            value.register_hook(lambda grad: self._take(key, grad))

    def _before(self, name: str):
        def hook(_module, args, kwargs):
            call = self.calls[name]
            args, kwargs = alias(args), alias(kwargs)
            inputs = [*leaves(args, "in"), *leaves(kwargs, "in")]
            for path, value in inputs:
                self._take(self._key(name, "forward_pre", path, call), value)
                self._watch(name, "backward", path, call, value)
            return args, kwargs

        return hook

    def _after(self, name: str):
        def hook(_module, _args, output):
            call = self.calls[name]
            self.calls[name] += 1
            for path, value in leaves(output, "out"):
                self._take(self._key(name, "forward", path, call), value)
                self._watch(name, "backward_pre", path, call, value)

        return hook


def join(parts: list[dict[Key, torch.Tensor]]) -> dict[Key, torch.Tensor]:
    """The ranks' records laid side by side along the batch dimension."""
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
