"""Has torch.compile know our operations, and mends what it does wrong with effects.

What is mended is named where it is: outputs of graphs that DDP splits, dead code in compiled autograd, modules that it
compiles because they have hooks, and what must not be compiled of this package.
"""

from __future__ import annotations

import inspect
import os
import sys
import types
from typing import Any

import torch
from torch import nn

from . import compiled, hooks


def ready(bridge: Any) -> None:
    """Make our operations known to torch.compile, which must be imported."""
    from torch._higher_order_ops.effects import _EffectType, _register_effectful_op

    def tap(number, leaves, paths, layouts, refusals, first, flags, split):
        return torch.empty(bridge.call_words + len(leaves), dtype=torch.int64, device="cpu")

    fakes = {"tap": tap, "gradient": _nothing, "factors": _factors, "scope": _nothing}
    for name, fake in fakes.items():
        torch.library.register_fake(f"flexmodel::{name}", fake)
        if name != "factors":
            _register_effectful_op(getattr(torch.ops.flexmodel, name).default, _EffectType.ORDERED)
    for function in compiled.ready(bridge):
        torch._dynamo.allow_in_graph(function)
    torch._dynamo.assume_constant_result(compiled.field_names)
    _hide_from_compiler()
    _mend_hooked_modules()
    _mend_split_graphs()
    _mend_compiled_autograd()


def _factors(call, kind, path):
    return torch.empty(2, dtype=torch.float64, device="cpu")


def _nothing(*_args: Any) -> None:
    return None


def _hide_from_compiler() -> None:
    """What runs of this package beside its graphs is not torch.compile's to make graphs of."""

    ours = os.path.dirname(__file__) + os.sep

    def skip(code: types.CodeType) -> None:
        if code.co_filename.startswith(ours):  # what a decorator of the standard library made of ours is not
            torch._dynamo.eval_frame.skip_code(code)
            for each in code.co_consts:
                if isinstance(each, types.CodeType):
                    skip(each)

    for name in [n for n in sys.modules if n.partition(".")[0] == __package__]:
        for value in vars(sys.modules[name]).values():
            if getattr(value, "__module__", None) == name:
                for function in (value, *vars(value).values()) if isinstance(value, type) else (value,):
                    if isinstance(function, types.FunctionType):
                        skip(function.__code__)


def _mend_hooked_modules() -> None:
    """It begins a graph with the forward of a module of torch's where that has hooks, as newer ones do, and not where
    these are ours."""
    from torch._dynamo import trace_rules

    original = trace_rules.check
    if "frame" not in inspect.signature(original).parameters:
        return

    def check(obj: object, is_inlined_call: bool = False, frame: Any = None) -> bool:
        module = None if frame is None or is_inlined_call else frame.f_locals.get("self")
        if isinstance(module, nn.Module) and hooks.are_ours(module):
            frame = None
        return original(obj, is_inlined_call, frame)

    trace_rules.check = check


def _mend_compiled_autograd() -> None:
    """It drops what a graph does for its effect alone, since the wrapping that `with_effects` is has none itself. Our
    operations go in without it."""
    from torch._dynamo.compiled_autograd import AutogradCompilerInstance

    original, wrapping = AutogradCompilerInstance.dce, torch.ops.higher_order.with_effects

    def dce(self: Any) -> Any:
        graph = self.fx_tracer.graph
        for node in [n for n in graph.nodes if n.target is wrapping and n.args[1].namespace == "flexmodel"]:
            with graph.inserting_before(node):
                graph.call_function(node.args[1], node.args[2:], node.kwargs)
        return original(self)

    AutogradCompilerInstance.dce = dce


def _mend_split_graphs() -> None:
    """Where DDP has torch.compile split a graph, it takes the token of the effects in one part for the first result of
    that part, which the next part is given."""
    from torch._functorch._aot_autograd.runtime_wrappers import FakifiedOutWrapper

    original = FakifiedOutWrapper.pre_compile, FakifiedOutWrapper.set_fwd_output_strides

    def pre_compile(self: Any, *args: Any, fw_metadata: Any) -> Any:
        result = original[0](self, *args, fw_metadata=fw_metadata)
        self.flexmodel_tokens = len(fw_metadata.tokens)
        self.out_metas = self.out_metas[self.flexmodel_tokens :]
        return result

    def set_fwd_output_strides(self: Any, strides: Any) -> Any:
        return original[1](self, strides[self.flexmodel_tokens :] if strides else strides)

    FakifiedOutWrapper.pre_compile = pre_compile
    FakifiedOutWrapper.set_fwd_output_strides = set_fwd_output_strides
