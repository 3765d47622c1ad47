"""The data-parallel training loop that the scripts beside it share: one slice of each batch per rank."""

import gc

import tiny
import torch
import torch.distributed as dist


def train(model, optimizer, steps: int = 3, sizes: tuple[int, ...] = (4, 4)) -> None:
    """Trains and prints the mean of the ranks' losses."""
    rank, world = dist.get_rank(), dist.get_world_size()
    for step in range(steps):
        tokens, targets = tiny.batch(step, list(sizes), rank)
        loss = tiny.loss_of(model(tokens), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        report(step, loss, world)


def report(step: int, loss, world: int) -> None:
    """Prints the mean of the ranks' losses on rank 0."""
    total = loss.detach().clone()
    dist.all_reduce(total)
    tiny.report(dist.get_rank(), step, total / world)


def launch(main, *args) -> None:
    """Joins the job, runs `main`, and leaves together: gloo aborts when ranks exit at different times, or while
    something still holds the process group."""
    torch.set_num_threads(1)
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    main(*args)
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()
