"""Trains until a file appears, in one of several ways of distributing the model: `live.py HOW STOP`.

Rank 1 of the first attempt is lost once there is a file `STOP-rank`.

Its optimizer changes nothing and its batches come again after four steps, so what a step computes is what the first of
these did.
"""

import functools
import itertools
import os
import pathlib
import sys
import time
from collections.abc import Callable

import parallel
import pipeline
import tensor_parallel
import tiny
import torch
import torch.distributed as dist

BATCHES = 4
ROWS = 4

Step = Callable[[int], torch.Tensor]
"""Trains on a batch of this number, and gives the mean loss of all ranks."""


def optimizer_of(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.0)


def training(model: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Step:
    """Each rank has rows of its own."""
    optimizer = optimizer or optimizer_of(model)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

    def step(number: int) -> torch.Tensor:
        tokens, targets = tiny.batch(number, [ROWS] * world, rank)
        loss = tiny.loss_of(model(tokens), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return mean(loss)

    return step


def mean(loss: torch.Tensor) -> torch.Tensor:
    total = loss.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(total)
        total /= dist.get_world_size()
    return total


def plain() -> Step:
    return training(tiny.build())


def ddp() -> Step:
    return training(torch.nn.parallel.DistributedDataParallel(tiny.build()))


def fsdp1() -> Step:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return training(FullyShardedDataParallel(tiny.build(), device_id=torch.device("cpu")))


def fsdp2() -> Step:
    from torch.distributed.fsdp import fully_shard

    model = tiny.build()
    for layer in model.layers:
        fully_shard(layer)
    return training(fully_shard(model))


def compiled_ddp() -> Step:
    return training(torch.compile(torch.nn.parallel.DistributedDataParallel(tiny.build()), backend="aot_eager"))


def compiled_fsdp2() -> Step:
    from torch.distributed.fsdp import fully_shard

    model = tiny.build()
    for layer in model.layers:
        layer.compile(backend="aot_eager")
        fully_shard(layer)
    return training(fully_shard(model))


def tp() -> Step:
    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    model = tensor_parallel.parallelize(tensor_parallel.build(), mesh)
    optimizer = optimizer_of(model)

    def step(number: int) -> torch.Tensor:
        tokens, targets = tiny.batch(number, [2 * ROWS], 0)
        loss = tiny.loss_of(model(tokens), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    return step


def zero3() -> Step:
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": ROWS,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, "overlap_comm": False},
        "zero_allow_untested_optimizer": True,
    }
    model = tiny.build()
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer_of(model), config=config)

    def step(number: int) -> torch.Tensor:
        tokens, targets = tiny.batch(number, [ROWS] * dist.get_world_size(), dist.get_rank())
        loss = tiny.loss_of(engine(tokens), targets)
        engine.backward(loss)
        engine.step()
        return mean(loss)

    return step


def staged() -> Step:
    """Stages of a pipeline, by 1F1B."""
    rank, world = dist.get_rank(), dist.get_world_size()
    stage = pipeline.PipelineStage(pipeline.stage_of(pipeline.build(), rank, world), rank, world, torch.device("cpu"))
    schedule = pipeline.get_schedule_class("1F1B")(stage, n_microbatches=len(pipeline.SIZES), loss_fn=tiny.loss_of)
    optimizer = optimizer_of(stage.submod)

    def step(number: int) -> torch.Tensor:
        tokens, targets = tiny.batch(number, [sum(pipeline.SIZES)], 0)
        loss = pipeline.advance(schedule, optimizer, tokens, targets, rank == 0)
        dist.broadcast(loss, src=world - 1)
        return loss

    return step


def inference() -> Step:
    """No rank trains; with FSDP they make their passes together."""
    from torch.distributed.fsdp import fully_shard

    model = fully_shard(tiny.build()).eval()
    rank, world = dist.get_rank(), dist.get_world_size()

    @torch.no_grad()
    def step(number: int) -> torch.Tensor:
        tokens, targets = tiny.batch(number, [ROWS] * world, rank)
        return mean(tiny.loss_of(model(tokens), targets))

    return step


def apart() -> Step:
    """Each rank makes passes of its own."""
    model = tiny.build().eval()

    @torch.no_grad()
    def step(number: int) -> torch.Tensor:
        tokens, targets = tiny.batch(number, [ROWS] * 2, dist.get_rank())
        return tiny.loss_of(model(tokens), targets)

    return step


def parts() -> Step:
    """A process that calls the parts of its model, and never the model."""
    model = tiny.build().eval()

    @torch.no_grad()
    def step(number: int) -> torch.Tensor:
        tokens, targets = tiny.batch(number, [ROWS], 0)
        hidden = model.embed(tokens)
        for layer in model.layers:
            hidden = layer(hidden)
        return tiny.loss_of(model.lm_head(model.norm(hidden)), targets)

    return step


def serving(schedule_class: str, per_rank: int) -> Step:
    """Stages of a pipeline without an optimizer, `per_rank` on each rank: each counts its passes by itself."""
    rank, world = dist.get_rank(), dist.get_world_size()
    stages = []
    for number in range(rank, world * per_rank, world):
        submod = pipeline.stage_of(pipeline.build(), number, world * per_rank).eval()
        stages.append(pipeline.PipelineStage(submod, number, world * per_rank, torch.device("cpu")))
    made = pipeline.get_schedule_class(schedule_class)
    schedule = made(stages if per_rank > 1 else stages[0], n_microbatches=len(pipeline.SIZES))

    @torch.no_grad()
    def step(number: int) -> torch.Tensor:
        tokens, targets = tiny.batch(number, [sum(pipeline.SIZES)], 0)
        logits = schedule.eval(*([tokens] if rank == 0 else []))
        loss = torch.zeros(()) if logits is None else tiny.loss_of(logits, targets)
        dist.broadcast(loss, src=world - 1)
        return loss

    return step


def served() -> Step:
    return serving("GPipe", 1)


def looped() -> Step:
    """With two stages a rank, one after the other."""
    return serving("LoopedBFS", 2)


def by_hand() -> Step:
    """A process without an optimizer: backward passes end its steps."""
    model = tiny.build()

    def step(number: int) -> torch.Tensor:
        tokens, targets = tiny.batch(number, [ROWS], 0)
        loss = tiny.loss_of(model(tokens), targets)
        model.zero_grad()
        loss.backward()
        return loss.detach()

    return step


def in_turn() -> Step:
    """Two optimizers step one after the other, with a module called between that is no model."""
    model, criterion = tiny.build(), torch.nn.MSELoss()
    halves = [torch.optim.SGD(part.parameters(), lr=0.0) for part in (model.layers, model.lm_head)]

    def step(number: int) -> torch.Tensor:
        tokens, targets = tiny.batch(number, [ROWS], 0)
        loss = tiny.loss_of(model(tokens), targets)
        model.zero_grad()
        loss.backward()
        halves[0].step()
        criterion(tokens.float(), targets.float())
        halves[1].step()
        return loss.detach()

    return step


def in_backward() -> Step:
    """Each parameter has an optimizer, which steps in the backward pass, and layers are computed again there."""
    from torch.utils.checkpoint import checkpoint

    model = tiny.build()
    of = {parameter: torch.optim.SGD([parameter], lr=0.0) for parameter in model.parameters()}
    for parameter, optimizer in of.items():
        parameter.register_post_accumulate_grad_hook(lambda _, optimizer=optimizer: optimizer.step())
    for layer in model.layers:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)

    def step(number: int) -> torch.Tensor:
        tokens, targets = tiny.batch(number, [ROWS], 0)
        loss = tiny.loss_of(model(tokens), targets)
        model.zero_grad()
        loss.backward()
        return loss.detach()

    return step


TRAINING = (plain, ddp, fsdp1, fsdp2, compiled_ddp, compiled_fsdp2, tp, zero3, staged, by_hand, in_turn, in_backward)
HOW = {each.__name__: each for each in (*TRAINING, inference, apart, parts, served, looped)}


def main(how: str, stop: str) -> None:
    torch.set_num_threads(1)
    step = HOW[how]()
    rank = dist.get_rank() if dist.is_initialized() else 0
    for number in itertools.count():
        if rank == 1 and pathlib.Path(f"{stop}-rank").exists() and os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0":
            os._exit(17)
        tiny.report(rank, number, step(number % BATCHES))
        over = torch.tensor(float(pathlib.Path(stop).exists()))
        if (over if how == "apart" else mean(over)) > 0:
            return
        time.sleep(0.005)


ALONE = {each.__name__ for each in (plain, parts, by_hand, in_turn, in_backward)}
"""Those of one process."""


if __name__ == "__main__":
    if sys.argv[1] in ALONE:
        main(*sys.argv[1:])
    else:
        if sys.argv[1] == "zero3":
            import deepspeed

            deepspeed.init_distributed("gloo")
        parallel.launch(main, *sys.argv[1:])
