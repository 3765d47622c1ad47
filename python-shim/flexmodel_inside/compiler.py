"""Has torch.compile know our operations, and mends what it does wrong with effects.

What is mended is named where it is: outputs of graphs that DDP splits, dead code in compiled autograd, modules that it
compiles because they have hooks, and what must not be compiled of this package.
"""

from __future__ import annotations

import inspect
import os
import sys
import types
from collections.abc import Callable
from typing import Any

import torch

from . import compiled, hooks
from .naming import is_module
from .patches import follow, given, wrap


def ready(bridge: Any, guard: Callable[..., Any]) -> None:
    """Make our operations known to torch.compile, which must be imported. `guard` makes of a function one that raises
    nothing."""
    from torch._higher_order_ops.effects import _EffectType, _register_effectful_op

    def tap(number, leaves, paths, layouts, refusals, first, flags, split):
        return torch.empty(bridge.call_words + len(leaves), dtype=torch.int64, device="cpu")

    fakes = {"tap": tap, "gradient": _nothing, "factors": _factors, "forward_pass": _nothing}
    for name, fake in fakes.items():
        torch.library.register_fake(f"flexmodel::{name}", fake)
        if name != "factors":
            _register_effectful_op(getattr(torch.ops.flexmodel, name).default, _EffectType.ORDERED)
    for function in compiled.ready(bridge, guard):
        torch._dynamo.allow_in_graph(function)
    torch._dynamo.assume_constant_result(compiled.field_names)
    torch._dynamo.assume_constant_result(compiled.is_off)
    _hide_from_compiler()
    _mend_hooked_modules()
    _mend_split_graphs(guard)
    _mend_compiled_autograd(guard)


def _factors(call, kinds, path):
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

    if "frame" not in inspect.signature(trace_rules.check).parameters:
        return

    def mended(original: Any) -> Any:
        def check(obj: object, is_inlined_call: bool = False, frame: Any = None) -> bool:
            module = None if frame is None or is_inlined_call else frame.f_locals.get("self")
            if is_module(module) and hooks.are_ours(module):
                frame = None
            return original(obj, is_inlined_call, frame)

        return check

    wrap(trace_rules, "check", mended)


def _mend_compiled_autograd(guard: Callable[..., Any]) -> None:
    """It drops what a graph does for its effect alone, since the wrapping that `with_effects` is has none itself. Our
    operations go in without it."""
    from torch._dynamo.compiled_autograd import AutogradCompilerInstance

    wrapping = torch.ops.higher_order.with_effects

    def unwrap(*call: Any) -> None:
        graph = given(*call, 0, "self").fx_tracer.graph
        for node in [n for n in graph.nodes if n.target is wrapping and n.args[1].namespace == "flexmodel"]:
            with graph.inserting_before(node):
                graph.call_function(node.args[1], node.args[2:], node.kwargs)

    follow(AutogradCompilerInstance, "dce", guard, before=unwrap)


def _mend_split_graphs(guard: Callable[..., Any]) -> None:
    """Where DDP has torch.compile split a graph, it takes the token of the effects in one part for the first result of
    that part, which the next part is given."""
    from torch._functorch._aot_autograd.runtime_wrappers import FakifiedOutWrapper

    def drop_metas(_: Any, args: tuple, kwargs: dict) -> None:
        wrapper = given(args, kwargs, 0, "self")
        wrapper.flexmodel_tokens = len(kwargs["fw_metadata"].tokens)
        wrapper.out_metas = wrapper.out_metas[wrapper.flexmodel_tokens :]

    def drop_strides(_: Any, *call: Any) -> None:
        wrapper = given(*call, 0, "self")
        if wrapper.fwd_output_strides:
            wrapper.fwd_output_strides = wrapper.fwd_output_strides[getattr(wrapper, "flexmodel_tokens", 0) :]

    follow(FakifiedOutWrapper, "pre_compile", guard, after=drop_metas)
    follow(FakifiedOutWrapper, "set_fwd_output_strides", guard, after=drop_strides)
