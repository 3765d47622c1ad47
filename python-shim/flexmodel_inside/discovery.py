"""Finds models when they are first called.

While a module that we have not looked at may be called, `nn.Module.__call__` is ours; it looks at every model, or only
at what is new if that is single modules, puts the original back, and goes on. From then on a module that nobody
selected pays nothing, but for models, whose two hooks tell their passes; until a module is constructed, wrapped or
copied, the process joins others as a rank, or other hooks may begin. A function that torch.compile has compiled calls
models past `nn.Module.__call__`: what it calls first is ours meanwhile, too.
"""

from __future__ import annotations

import atexit
import functools
import zlib
from collections.abc import Set
from itertools import chain
from typing import Any

import torch
from torch import nn

from . import collectives, guarded, hooks, imports, patches
from ._bridge import KIND_PARAM
from .clock import Clock
from .collectives import Collectives
from .communicators import Communicators
from .faults import Faults
from .frameworks import Frameworks, Job, ModelFacts, Stage
from .holders import Holders
from .layouts import Layouts
from .mesh import ASSUMED, PIPELINE, Axis, Meshes, unknown
from .module_registry import ModuleRegistry
from .naming import all_in, authored, authored_class, held_by, is_module, is_scripted, stored, walk
from .orders import UNSTATED, orders
from .parameters import Parameters, ParameterTaps
from .patches import given
from .ranks import Group, rank_and_world, sign, started_by_rank
from .store import JobStore
from .tapping import Tapping, part_of

# A mask of every kind of capture.
_ALL_KINDS = 0xFFFFFFFF


class Discovery:
    """Finds all models of this process, and has those tapped in which something is selected."""

    def __init__(self, bridge: Any) -> None:
        self._bridge = bridge
        self._faults = Faults(bridge)
        self._registry = ModuleRegistry(self._faults.guard, on_change=self._arm, on_destroyed=self._forget)
        # What stands in for that by which models are called, while we are armed.
        self._entries = [patches.prepare(nn.Module, "__call__", self._replacement())]
        self._meshes = Meshes()
        self._layouts = Layouts()
        self._taps = Tapping(bridge, self._faults, self._registry)
        self._parameter_taps = ParameterTaps(bridge, self._faults)
        self._holders = Holders(bridge)
        self._communicators = Communicators(bridge)
        self._group = Group()
        self._store = JobStore(bridge, self._group)
        self._clock = Clock(bridge, self._holders, self._parameter_taps, self._taps.step_ended, self._turn)
        job = Job(
            bridge=bridge,
            faults=self._faults,
            meshes=self._meshes,
            layouts=self._layouts,
            changed=self._registry.changed,
            joined=self._joined,
            meet=self._registry.member,
            ignoring=self._registry.ignoring,
            pause=self._pause,
            settle=guarded(bridge, self._settle),
            tapped_as=self._registry.tapped_as,
            prepared=self._prepared,
            begin_batch=self._begin_batch,
            clock=self._clock,
            parameter_taps=self._parameter_taps,
            compiler_is_here=self._compiler_is_here,
            caches=lambda: self._taps.caches,
        )
        self._frameworks = Frameworks(job)
        self._parameters = Parameters(self._layouts, self._frameworks)
        self._collectives = Collectives(self._meshes, lambda: bool(self._frameworks.first("is_reducing")))
        self._look_at = guarded(bridge, self._look)
        self._goes_on_with = guarded(bridge, self._goes_on)
        # Functions of torch.compile's begin without a word to us.
        self._settle_early = False
        self._armed = False
        self._paused = False
        self._looking = False
        # Other hooks may be about to begin.
        self._turning = False
        self._said_scripted = False
        self._said_started = False

    def watch(self) -> None:
        """Start."""
        bridge, guard = self._bridge, self._faults.guard
        self._registry.watch()
        hooks.hide_from_jit(guard)
        hooks.keep_from_copies(guard)
        hooks.stay_last(guard)
        patches.also_undo(lambda: hooks.drop_all(self._registry.modules()))
        atexit.register(guarded(bridge, self._finish))
        bridge.capture_parameters_with(guarded(bridge, lambda serial: self._parameter_taps.capture(serial, KIND_PARAM)))
        bridge.describe_with(self._layouts.describe)
        # What raises there leaves it unknown which passes are one.
        bridge.count_collectives_with(guard(self._collectives.now, "counting collectives"))
        bridge.undo_with(guarded(bridge, self._taps.undo_if_off))
        bridge.turn_with(guarded(bridge, self._turn))
        imports.when_imported(
            (collectives.MODULE,), guarded(bridge, lambda: self._collectives.follow(self._faults.guard))
        )
        self._frameworks.watch(imports.when_imported, functools.partial(guarded, bridge))
        self._arm()

    def _finish(self) -> None:
        self._communicators.finish()
        self._bridge.finish()

    def _replacement(self) -> Any:
        """What stands in for `nn.Module.__call__` while we are armed. One function for good: torch.compile keeps it."""
        discovery, original = self, nn.Module.__call__

        @functools.wraps(original)
        def __call__(*args: Any, **kwargs: Any) -> Any:
            if not torch.compiler.is_compiling() and discovery._armed:
                called = args[0] if args and is_module(args[0]) else None
                if not discovery._must_wait(called):
                    discovery._disarm()
                    discovery._look_at(called)
            return original(*args, **kwargs)

        return __call__

    def _compiled_replacement(self, original: Any) -> Any:
        """What stands in for what each function of torch.compile's calls first, before it looks for its graphs."""

        @functools.wraps(original)
        def _callback_from_stance(*args: Any, **kwargs: Any) -> Any:
            # Called with nothing it is one that must not be compiled, in the middle of others.
            if self._armed and not self._must_wait(None) and callable(given(args, kwargs, 0, "callback")):
                self._disarm()
                self._look_at(None)
            return original(*args, **kwargs)

        return _callback_from_stance

    def _arm(self) -> None:
        self._armed = self._armed or self._bridge.active()
        # Somebody else may have replaced it (torch.fx does while it traces): then theirs stays, and we look when theirs
        # calls ours, or when the original is back. Ours may be there already: put back by who found it there before.
        if self._armed:
            for entry in self._entries:
                entry.put()

    def _must_wait(self, called: nn.Module | None) -> bool:
        """Whether nobody may look now: what is called is not the job's own work, or goes on with the hooks that it was
        begun with, as a replay in a backward pass and a part of a pass do."""
        if self._paused or not self._turning:
            return self._paused
        return torch._C._current_graph_task_id() != -1 or bool(called is not None and self._goes_on_with(called))

    def _goes_on(self, called: nn.Module) -> bool:
        """Whether the call of a module begins no pass."""
        module = authored(called)
        known = self._registry.known(module)
        if known is None or (known.tapped is None and not known.marks and not known.begins):
            # A function, such as a loss, is in no model; what else nobody knows is a new one.
            is_function = not held_by(module) and not stored(module)
            return is_function or (known is not None and self._bridge.goes_on(-1, -1, -1))
        if known.model:
            return False
        models = {*known.marks, *known.begins, *(known.tapped or ())[:1]}
        return any(self._bridge.goes_on(serial, part_of(known), known.tap) for serial in models)

    def _disarm(self) -> None:
        for entry in self._entries:
            entry.restore()
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
        self._looking, self._turning = True, False
        try:
            imports.look()
            self._store.open()
            if self._bridge.turn(*rank, self._group.number()):
                self._taps.begin_revision()
                self._registry.all_again()
            member = self._registry.member
            if called is not None:
                self._registry.called(called)
            # First, so that they are known: what torch's `pipeline()` makes is not.
            stages = {member(authored(module)).serial: module for module in self._stage_modules()}
            models = {member(authored(root)).serial: root for root in self._registry.roots()}
            self._take_out(stages, models)
            # A stage may be made of parts of a model that is still there: they are the stage's.
            theirs = {id(p) for stage in stages.values() for p in _parameters_in(stage)}
            for serial in sorted(models, key=lambda serial: (serial not in stages, serial)):
                root, others = models[serial], theirs if serial not in stages else set()
                what = f"a model of class {type(root).__name__} is not captured"
                self._faults.of(what, self._look_into, root, models.keys(), called, others, *rank)
            if not self._taps.renew_graphs():
                self._arm()
            self._bridge.resolved()
            self._holders.tell()
            self._communicators.join(lambda: chain.from_iterable(map(_parameters_in, models.values())))
        except BaseException:  # the job's: there are models that were not looked at
            self._registry.changed()
            raise
        finally:
            self._looking = False

    def _stage_modules(self) -> list[nn.Module]:
        """What the stages of pipelines run, which may be wrapped."""
        return [stage.submod for stage in self._frameworks.stages() if stage.submod is not None]

    def _take_out(self, stages: dict[int, nn.Module], models: dict[int, nn.Module]) -> None:
        """What has stages of a pipeline in it is no model of the job's: they are, in its place."""
        inside = {id(authored(stage)): serial for serial, stage in stages.items() if serial not in models}
        for serial, root in list(models.items()) if inside else ():
            held = [inside[id(module)] for module in all_in(root) if id(module) in inside]
            if held:
                del models[serial]
                self._parameter_taps.drop(serial)
                models.update((each, stages[each]) for each in held)

    def _look_into(
        self, root: nn.Module, models: Set[int], called: nn.Module | None, theirs: Set[int], rank: int, world: int
    ) -> None:
        """Taps what is selected of a model; `models` are the serials of all. `called` is what the job calls now, if
        that is known; `theirs` are ids of parameters that other models have."""
        if is_scripted(root):
            self._tell_scripted("a model")
            return
        of = self._faults.of
        tree = walk(root)
        for name, module in tree:
            if name is not None and is_scripted(module):
                self._tell_scripted(name)
        named = [(name, module) for name, module in tree if name is not None and not is_scripted(module)]
        spelled = [(of(repr(name), _spelled, name, module), (name, module)) for name, module in named]
        modules = [each for words, each in spelled if words is not None]
        facts = self._frameworks.look_at([module for _, module in tree], self._parameter_taps.are_wanted())
        unstated = [UNSTATED] * len(modules)
        order = of("the order of dimensions", orders, modules, otherwise=unstated)
        if facts.order is not None:
            order = [facts.order] * len(modules)
        classes = [words for words, _ in spelled if words is not None]
        entries = [(*words, each) for words, each in zip(classes, order, strict=True)]
        model = authored(root)
        known, stage = self._registry.member(model), self._stage_of(model)
        nothing = unknown(rank, world)
        facts.mesh = of("the mesh of a model", self._mesh, root, facts, stage, rank, world, otherwise=nothing)
        parameters = {}
        if facts.with_parameters:
            found = of("the parameters of a model", self._parameters.of_model, modules, facts, otherwise={})
            parameters = {name: each for name, each in found.items() if not of(name, each.is_in, theirs)}
        if any(axis.role == ASSUMED for axis in facts.mesh):
            self._bridge.digest_inputs()
        self._collectives.put(known.serial, facts.mesh, facts.reduces)
        selected, of_parameters = self._bridge.select(
            known.serial,
            entries,
            list(parameters),
            facts.wrapper,
            facts.mesh,
            _signature(entries, facts),
            rank,
            world,
            self._group.number(),
        )
        self._parameter_taps.drop(known.serial)
        self._holders.drop(known.serial)
        if stage is not None:
            self._tell_microbatches(known.serial, stage)
        if not selected and not of_parameters:
            # Its passes are counted all the same: hooks may come. What has neither parts nor parameters is a function.
            if len(modules) > 1 or stored(model):
                if not self._bridge.wants(_ALL_KINDS):
                    sign(world)
                known.model = True
                self._taps.put(known.serial, model, modules, [], called, models)
            return
        each = list(parameters.items())
        self._parameter_taps.put(known.serial, {tap: each[index] for index, tap in of_parameters})
        sign(world)
        known.model = True
        self._taps.put(known.serial, model, modules, selected, called, models)
        self._holders.put(known.serial, model, [(after.tap, modules[index][1]) for index, (_, after) in selected])

    def _stage_of(self, model: nn.Module) -> Stage | None:
        """The stage that runs a model; None if there is none."""
        for stage in self._frameworks.stages():
            if stage.submod is not None and any(module is model for module in all_in(stage.submod)):
                return stage
        return None

    def _mesh(self, root: nn.Module, facts: ModelFacts, stage: Stage | None, rank: int, world: int) -> list[Axis]:
        over = stage.submod if stage is not None else root
        if stage is not None and over is not None and over is not root:
            facts = self._frameworks.look_at(all_in(over), with_parameters=False)
        if not facts.is_known:
            return unknown(rank, world)
        axes = facts.axes
        if stage is not None and over is not None:
            group = stage.group or torch.distributed.group.WORLD
            axes = [self._meshes.axis_of_group(group, "pp", PIPELINE), *axes]
        return self._meshes.of_model(axes, rank, world)

    def _joined(self) -> None:
        self._group.joined()
        self._meshes.forget()
        self._registry.changed()

    def _forget(self, serial: int) -> None:
        self._parameter_taps.drop(serial)
        self._holders.drop(serial)
        self._collectives.drop(serial)
        self._bridge.forget(serial)

    def _turn(self) -> None:
        """Other hooks may begin with the next pass: look again when that begins."""
        self._turning = True
        self._arm()
        if self._settle_early:
            self._settle()

    def _compiler_is_here(self) -> None:
        # What we do when a module is called is not the job's to be compiled.
        self._look_at = torch._dynamo.disable(self._look_at)
        self._goes_on_with = torch._dynamo.disable(self._goes_on_with)
        self._clock.compiler_is_here()
        self._taps.compiler_is_here(self._settle)
        owner, name = torch._dynamo.eval_frame, "_callback_from_stance"
        if hasattr(owner, name):
            self._entries.append(patches.prepare(owner, name, self._compiled_replacement(getattr(owner, name))))
        else:
            self._settle_early = True

    def _settle(self) -> None:
        """Look at models that were not looked at."""
        if self._armed:
            self._disarm()
            self._look(None)

    def _pause(self, paused: bool) -> None:
        """While paused, models that are called are not the job's own work."""
        self._paused = paused
        self._bridge.pause(paused)

    def _prepared(self, stage: Stage) -> None:
        known = None if stage.submod is None else self._registry.member(authored(stage.submod))
        if known is not None and known.model:
            self._tell_microbatches(known.serial, stage)

    def _tell_microbatches(self, serial: int, stage: Stage) -> None:
        # Torch's stages learn the first from their schedule, and say nothing of the second.
        if stage.chunks:
            of_all = stage.group is None or stage.group.size() == torch.distributed.get_world_size()
            self._bridge.microbatches(serial, of_all, stage.chunks, *getattr(stage, "microbatch", (-1, -1)))

    def _begin_batch(self) -> None:
        """A pipeline begins a batch, and other hooks may with it."""
        self._bridge.batch()
        if self._bridge.due():
            self._turn()

    def _tell_scripted(self, what: str) -> None:
        if not self._said_scripted:
            self._said_scripted = True
            self._bridge.notice(f"{what} is compiled by torch.jit, and cannot be tapped; tap modules around it")


def _parameters_in(root: nn.Module) -> list[torch.Tensor]:
    return [parameter for module in all_in(root) for parameter in stored(module).values()]


def _signature(entries: list[Any], facts: ModelFacts) -> int:
    """Equal where models are made of the same modules and are distributed in the same way."""
    axes = [(axis.name, axis.size, axis.role) for axis in facts.mesh]
    return zlib.crc32(repr((entries, facts.wrapper, axes)).encode(errors="surrogatepass"))


def _spelled(name: str, module: nn.Module) -> tuple[str, str, str]:
    """The name of a module, that of its class, and that with the package it is from."""
    cls = authored_class(module)
    words = (name, cls.__name__, f"{cls.__module__}.{cls.__qualname__}")
    for word in words:
        if "\0" in word:
            raise ValueError("a zero byte in its name")
        word.encode()
    return words
