"""Finds models when they are first called, and taps them.

While a module that we have not looked at may be called, `nn.Module.__call__` is ours; it looks at every model, or only
at what is new if that is single modules, puts the original back, and goes on. From then on a module that nobody
selected pays nothing, until a module is constructed, wrapped or copied, or the process joins others as a rank.
"""

from __future__ import annotations

import atexit
import functools
import sys
import threading
from collections.abc import Set
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from . import alike, compiled, compiler, guarded, hooks, imports, patches, steps
from ._bridge import KINDS_GRADIENTS, KINDS_OF_PARAMETERS
from .caches import Caches
from .communicators import Communicators
from .contexts import Contexts
from .family import Family
from .faults import Faults
from .layouts import Layouts
from .mesh import SUPPOSED, Meshes, supposed
from .naming import (
    all_in,
    authored,
    authored_class,
    held_by,
    holders,
    is_called_in_parts,
    is_module,
    is_scripted,
    named,
    own,
    stored,
)
from .parameters import GRAD, PARAM, Parameter, Parameters
from .pipelines import MEGATRON, Pipelines
from .ranks import rank_and_world, sign, started_by_rank, tell_joined
from .scaling import DEEPSPEED, GRAD_SCALER, SHARDED, Scaling
from .wrappers import UNSTATED, orders, wrapper_name


class Models:
    """All models of this process."""

    def __init__(self, bridge: Any) -> None:
        self._bridge = bridge
        self._faults = Faults(bridge)
        guard = self._faults.guard
        self._family = Family(guard, on_change=self._arm, on_gone=self._forget)
        self._call = patches.prepare(nn.Module, "__call__", self._replacement())
        self._meshes = Meshes(self._faults)
        self._layouts = Layouts(self._meshes)
        self._pipelines = Pipelines(guard, self._pause, self._family.changed)
        self._communicators = Communicators(bridge)
        self._paused = False
        # With its name, by the model's serial, and the tap's number.
        self._parameters: dict[int, dict[int, tuple[str, Parameter]]] = {}
        self._look_at = guarded(bridge, self._look)
        self._armed = False
        self._looking = False
        # What makes a hook traceable, once torch.compile may trace it.
        self._traceable: Any = None
        self._uneven = False
        self._said_scripted = False
        self._said_started = False

    def watch(self) -> None:
        """Start."""
        self._family.watch()
        guard = self._faults.guard
        hooks.hide_from_jit(guard)
        hooks.keep_from_copies(guard)
        register_optimizer_step_pre_hook(guard(self._before_step, "what an optimizer steps with"))
        register_optimizer_step_post_hook(guard(self._after_step, "the step of an optimizer"))
        patches.also_undo(lambda: hooks.drop_all(self._family.modules()))
        atexit.register(guarded(self._bridge, self._finish))
        self.follow_scaling()
        self._bridge.take_with(guarded(self._bridge, lambda serial: self._take(serial, PARAM)))
        self._bridge.describe_with(guard(self._layouts.describe, "how a tensor lies"))
        self._arm()

    def _finish(self) -> None:
        self._communicators.finish()
        self._bridge.finish()

    def _replacement(self) -> Any:
        """What stands in for `nn.Module.__call__` while we are armed. One function for good: torch.compile keeps it."""
        models, original = self, nn.Module.__call__

        @functools.wraps(original)
        def __call__(*args: Any, **kwargs: Any) -> Any:
            if not torch.compiler.is_compiling() and models._armed and not models._paused:
                models._disarm()
                models._look_at(args[0] if args and is_module(args[0]) else None)
            return original(*args, **kwargs)

        return __call__

    def _arm(self) -> None:
        self._armed = self._armed or self._bridge.active()
        # Somebody else may have replaced it (torch.fx does while it traces): then theirs stays, and we look when theirs
        # calls ours, or when the original is back. Ours may be there already: put back by who found it there before.
        if self._armed:
            self._call.put()

    def _disarm(self) -> None:
        self._call.restore()
        self._armed = False

    def _look(self, called: nn.Module | None) -> None:
        if self._looking or not self._bridge.active():
            return
        rank = rank_and_world()
        if rank is None:
            return
        parent = started_by_rank(rank[1])
        if parent is not None:
            if not self._said_started:
                self._said_started = True
                self._bridge.notice(f"started by process {parent}, a rank of the job, and no rank itself: not tapped")
            return
        self._looking = True
        try:
            imports.look()
            member = self._family.member
            if called is not None:
                self._family.called(called)
            tops = {member(authored(top)).serial: top for top in self._family.tops()}
            stages = {member(authored(stage)).serial: stage for stage in self._pipelines.modules()}
            self._take_out(stages, tops)
            # A stage may be made of parts of a model that is still there: they are the stage's.
            theirs = {id(p) for stage in stages.values() for module in all_in(stage) for p in stored(module).values()}
            for serial in sorted(tops, key=lambda serial: (serial not in stages, serial)):
                top, others = tops[serial], theirs if serial not in stages else set()
                what = f"a model of class {type(top).__name__} is not captured"
                self._faults.of(what, self._tap, top, tops.keys(), called, others, *rank)
            self._bridge.resolved()
            self._communicators.join()
        except BaseException:  # the job's: there are models that were not looked at
            self._family.changed()
            raise
        finally:
            self._looking = False

    def _take_out(self, stages: dict[int, nn.Module], tops: dict[int, nn.Module]) -> None:
        """What has stages of a pipeline in it is no model of the job's: they are, in its place."""
        inside = {id(authored(stage)): serial for serial, stage in stages.items() if serial not in tops}
        for serial, top in list(tops.items()) if inside else ():
            held = [inside[id(module)] for module in all_in(top) if id(module) in inside]
            if held:
                del tops[serial]
                self._parameters.pop(serial, None)
                tops.update((each, stages[each]) for each in held)

    def _tap(
        self, top: nn.Module, models: Set[int], called: nn.Module | None, theirs: Set[int], rank: int, world: int
    ) -> None:
        """Taps what is selected of a model; `models` are the serials of all. `called` is what the job calls now, if
        that is known; `theirs` are ids of parameters that other models have."""
        if is_scripted(top):
            self._tell_scripted("a model")
            return
        of = self._faults.of
        spelled = [(of(repr(name), _spelled, name, module), (name, module)) for name, module in named(top)]
        modules = [each for words, each in spelled if words is not None]
        for name, module in modules:
            for key, child in held_by(module):
                if is_scripted(child):
                    self._tell_scripted(f"{name}.{key}" if name else key)
        told = of("the order of dimensions", orders, modules, otherwise=[UNSTATED] * len(modules))
        classes = [words for words, _ in spelled if words is not None]
        entries = [(*words, order) for words, order in zip(classes, told, strict=True)]
        model = authored(top)
        known = self._family.member(model)
        serial = known.serial
        stage = self._pipelines.stage_of(model)
        stages = [] if stage is None else self._pipelines.axes(stage, self._meshes)
        over = top if stage is None else stage.submod
        unknown = supposed(rank, world)
        mesh = of("the mesh of a model", self._meshes.of_model, over, rank, world, stages, otherwise=unknown)
        parameters: dict[str, Parameter] = {}
        if self._bridge.wants(KINDS_OF_PARAMETERS):
            found = Parameters(top, modules, self._meshes, self._layouts, mesh, self._faults).by_name
            parameters = {name: each for name, each in found.items() if not of(name, each.is_in, theirs)}
        axes = [axis[:4] for axis in mesh]
        if any(axis.role == SUPPOSED for axis in mesh):
            self._bridge.digest_inputs()
        selected, of_parameters = self._bridge.select(
            serial, entries, list(parameters), wrapper_name(top), axes, rank, world
        )
        self._parameters.pop(serial, None)
        if not selected and not of_parameters:
            return
        if stage is not None:
            self._tell_microbatches(serial, stage)
        each = list(parameters.items())
        self._parameters[serial] = {tap: each[index] for index, tap in of_parameters}
        sign(world)
        known.model = True
        tapped = [modules[index][1] for index, _ in selected]
        scopes = [model]
        inside = [module for _, module in modules]
        if is_called_in_parts(inside, model if called is None else called):
            scopes += holders(inside, tapped)
        # A scope begins before its module's own taps fire, and ends after them.
        ends = []
        for module in scopes:
            known = self._family.member(module)
            if serial not in known.scoped:
                known.scoped.add(serial)
                begin, end = self._bridge.scope(serial, 0 if module is model else known.serial + 1)
                key = compiled.SCOPE_KEY - len(known.scoped)
                self._hook(module, "_forward_pre_hooks", key, begin)
                ends.append((module, key, end))
        for index, (before, after) in selected:
            name, module = modules[index]
            of(name or "the model", self._tap_module, name, module, before, after, serial, models)
        for module, key, end in ends:
            self._hook(module, "_forward_hooks", key, end, always_call=self._traceable is None)
        self._uneven = True

    def _tap_module(
        self, name: str, module: nn.Module, before: Any, after: Any, serial: int, models: Set[int]
    ) -> None:
        known = self._family.member(module)
        if known.tapped is not None:
            owner, _ = known.tapped
            # What two models share is tapped in the first. What was a model before it became part of one moves.
            if known.tapped == (serial, name) or (owner != serial and owner in models):
                return
            self._untap(module)
        if before is not None:
            self._hook(module, "_forward_pre_hooks", compiled.TAP_KEY, before)
        self._hook(module, "_forward_hooks", compiled.TAP_KEY, after)
        known.tapped = (serial, name)

    def _take(self, serial: int, kind: int, held: Set[int] | None = None) -> None:
        """Captures what is due of a model's parameters; if given, of those alone with these ids."""
        with torch._C.DisableTorchFunction():  # what the job's classes of tensors do is no matter here
            for tap, (name, parameter) in self._parameters.get(serial, {}).items():
                due = self._bridge.due(tap, kind)
                if due and not self._faults.of(name, self._take_one, tap, kind, parameter, held):
                    self._bridge.refuse(tap, kind)

    def _take_one(self, tap: int, kind: int, parameter: Parameter, held: Set[int] | None) -> bool:
        piece = parameter.read(kind) if held is None or parameter.is_in(held) else None
        if piece is not None:
            self._bridge.parameter(tap, kind, *piece)
        return True

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        """An optimizer is about to use gradients: those that are there or, if it is given a closure, those that this
        computes, when it is called first. Parameters still are what the forward used, which torch.compile may have run
        without us where it knows no effects."""
        if not self._bridge.wants(KINDS_OF_PARAMETERS) or steps.has_stand_in(args, kwargs):
            return None
        # The model may be called in the closure for the first time.
        take = functools.partial(self._faults.of, "the gradients of an optimizer", self._take_of, optimizer)
        given = steps.with_stand_in(type(optimizer).step, args, kwargs, take)
        if given is None:
            take()
        return given

    def _after_step(self, *_: Any) -> None:
        self._bridge.stepped()
        self._undo_if_off()

    def _undo_if_off(self) -> None:
        """The engine switches taps off by itself too, and nothing of ours is called then."""
        if not self._bridge.active():
            patches.undo()

    def _take_of(self, optimizer: torch.optim.Optimizer) -> None:
        if not any(self._parameters.values()):
            return
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for serial in self._parameters:
            self._take(serial, PARAM, held)
            self._take(serial, GRAD, held)

    def _forget(self, serial: int) -> None:
        self._parameters.pop(serial, None)
        self._bridge.forget(serial)

    def _hook(self, module: nn.Module, kind: str, key: int, hook: Any, always_call: bool = False) -> None:
        hooks.drop_strays(module)  # of a class with a `__setstate__` of its own
        hooks.put(module, kind, key, self._dressed(hook, module), always_call)
        self._family.member(module).hooks.append((kind, key))

    def _dressed(self, hook: Any, module: nn.Module) -> Any:
        bind = getattr(hook, "bind", None)
        if bind is not None:
            bind(module)
        return hook if self._traceable is None else self._traceable(hook, module)

    def _untap(self, module: nn.Module) -> None:
        known = self._family.member(module)
        for kind, key in known.hooks:
            if key == compiled.TAP_KEY:
                hooks.drop(module, kind, key)
        known.hooks = [hook for hook in known.hooks if hook[1] != compiled.TAP_KEY]

    def dynamo_is_here(self) -> None:
        """torch.compile is in use: every hook has to be something that it can trace."""
        if self._traceable is not None:
            return
        try:
            compiler.ready(self._bridge, self._faults.guard)
            self._traceable = compiled.traced
        except Exception as e:
            self._traceable = hooks.Traceable
            why = f"{type(e).__name__}: {e}"
            self._bridge.notice(f"modules inside torch.compile are not captured with this torch: {why}")
        for member in self._family.members():
            module = member.module()
            for kind, key in member.hooks if module is not None else ():
                there = own(module, kind, {})
                if there.get(key) is not None:
                    there[key] = self._dressed(there[key], module)
                    own(module, "_forward_hooks_always_called", {}).pop(key, None)
        if self._traceable is compiled.traced:
            self._follow_compiler()

    def _follow_compiler(self) -> None:
        """Have our hooks in place before torch.compile traces anything, also a function that calls models."""
        # What we do when a module is called is not the job's to be compiled.
        self._look_at = torch._dynamo.disable(self._look_at)
        handler = torch._dynamo.callback.callback_handler
        begins, ends = guarded(self._bridge, self._compiling), guarded(self._bridge, self._compiled)

        def register(*_: Any) -> None:
            handler.register_start_callback(begins)
            handler.register_end_callback(ends)

        patches.follow(handler, "clear", self._faults.guard, after=register)
        register()
        Caches(self._bridge, self._settle, self._family.modules).watch(functools.partial(guarded, self._bridge))

    def _settle(self) -> None:
        """Has every hook of ours in place."""
        if patches.undone():
            return
        if self._armed:
            self._disarm()
            self._look(None)
        if self._uneven:
            self._uneven = False
            modules = self._family.modules()
            for module in modules:
                hooks.drop_strays(module)
            alike.even_out(modules)

    def _compiling(self, *_args: Any) -> None:
        self._settle()
        # The compiler makes modules of its own.
        self._family.deaf = threading.get_ident()

    def _compiled(self, *_args: Any) -> None:
        # Not before: what torch.compile does wrong with our operations is mended while it makes a graph.
        self._undo_if_off()
        self._family.deaf = None

    def distributed_is_here(self) -> None:
        """Look again whenever this process has become a rank, or another one."""
        tell_joined(self._faults.guard, self._family.changed)

    def _pause(self, paused: bool) -> None:
        """While paused, models that are called are not the job's own work."""
        self._paused = paused
        self._bridge.pause(paused)

    def contexts_are_here(self) -> None:
        """Follow how context parallelism cuts sequences."""
        Contexts(self._meshes, self._layouts, self._family.changed).watch(self._faults.guard)

    def pipelining_is_here(self) -> None:
        """Follow the stages of torch's pipelines."""
        self._pipelines.watch_torch(self._prepared)

    def megatron_is_here(self) -> None:
        """Follow the stages of megatron-core's."""
        self._pipelines.watch_megatron(self._prepared)

    def _prepared(self, stage: Any) -> None:
        known = self._family.member(authored(stage.submod))
        if known.model:
            self._tell_microbatches(known.serial, stage)

    def _tell_microbatches(self, serial: int, stage: Any) -> None:
        # Torch's stages learn the first from their schedule, and say nothing of the second.
        if stage.chunks:
            self._bridge.microbatches(serial, stage.chunks, *getattr(stage, "microbatch", (-1, -1)))

    def follow_scaling(self) -> None:
        """Follow what scales losses, as it is imported, if gradients are wanted at all."""
        if self._bridge.wants(KINDS_GRADIENTS):
            scaling = Scaling(self._bridge.loss_scale, self._faults.guard)
            for name, watch in (
                (GRAD_SCALER, scaling.watch_scaler),
                (SHARDED, scaling.watch_sharded_scaler),
                (DEEPSPEED, scaling.watch_deepspeed),
                (MEGATRON, scaling.watch_megatron),
            ):
                imports.when_imported([name], guarded(self._bridge, watch))

    def deepspeed_is_here(self) -> None:
        """Know engines before they are called: others may be first."""
        self._family.follow(sys.modules[DEEPSPEED].DeepSpeedEngine)  # type: ignore[attr-defined]

    def meshes_are_here(self) -> None:
        """Follow the meshes that the job makes."""
        self._meshes.watch()

    def dtensor_is_here(self) -> None:
        """Follow what becomes of DTensors."""
        self._layouts.watch(self._faults.guard)

    def _tell_scripted(self, what: str) -> None:
        if not self._said_scripted:
            self._said_scripted = True
            self._bridge.notice(f"{what} is compiled by torch.jit, and cannot be tapped; tap modules around it")


def _spelled(name: str, module: nn.Module) -> tuple[str, str, str]:
    """The name of a module, that of its class, and that with the package it is from."""
    cls = authored_class(module)
    words = (name, cls.__name__, f"{cls.__module__}.{cls.__qualname__}")
    for word in words:
        if "\0" in word:
            raise ValueError("a zero byte in its name")
        word.encode()
    return words
