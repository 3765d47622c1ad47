"""One process in place of the ranks that share a model: the whole tensors that their parts must make together.

`Whole.records` holds what modules were given, gave and got back, as in `reference_runs`; `Whole.params` and
`Whole.grads` are by parameter's name and step: the value that the step's forward used, and the gradient that the
optimizer was about to use.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import tiny
import torch
import torch.distributed as dist

import reference

Grads = list[torch.Tensor | None]


@dataclass
class Whole:
    """A training run in one process."""

    records: dict[reference.Key, torch.Tensor] = field(default_factory=dict)
    losses: list[str] = field(default_factory=list)
    params: dict[tuple[str, int], torch.Tensor] = field(default_factory=dict)
    grads: dict[tuple[str, int], torch.Tensor] = field(default_factory=dict)

    def end_step(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int, loss) -> None:
        """Notes parameters, gradients and loss of `step`, then takes it."""
        for name, parameter in model.named_parameters():
            self.params[name, step] = parameter.detach().clone()
            if parameter.grad is not None:
                self.grads[name, step] = parameter.grad.clone()
        self.losses.append(float(loss).hex())
        optimizer.step()


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """A process group with nobody else in it, for models that cannot be built without one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def by_pairs(parts: Sequence) -> Grads:
    """Sums as a tree: neighbours first, then pairs of neighbours, as ranks do that reduce along two mesh axes."""
    while len(parts) > 1:
        parts = [_add(a, b) for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def in_turn(parts: Iterable) -> Grads:
    """Sums from left to right, as a gradient does that is accumulated."""
    first, *rest = parts
    for part in rest:
        first = _add(first, part)
    return first


def _add(a: Grads, b: Grads) -> Grads:
    return [y if x is None else x if y is None else x + y for x, y in zip(a, b, strict=True)]


def mean_loss(model, tokens, targets):
    """What most of the programs train on."""
    return tiny.loss_of(model(tokens), targets)


def sliced(
    model,
    wanted,
    *,
    steps: int,
    sizes: Sequence[int],
    total: Callable = by_pairs,
    loss_of: Callable = mean_loss,
    ranks: int = 1,
    first: int = 0,
) -> Whole:
    """Runs `tiny.batch` in slices of `sizes` rows, one after another, and trains on the mean of their losses.

    The slices are what data-parallel ranks or a pipeline's microbatches see. Records join them along dimension 0.
    Where `ranks` share a slice, each with a loss of its own, gradients are those of the sum of these losses and
    parameters get their mean. `first` is the number of the first step, in a job that trained other models before.
    """
    whole, parts = Whole(), [{} for _ in sizes]
    recorder = reference.Recorder(model, wanted)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(steps):
        losses, grads = [], []
        for index, part in enumerate(parts):
            recorder.found = part
            recorder.forward_pass(first + step)
            tokens, targets = tiny.batch(step, list(sizes), index)
            loss = loss_of(model, tokens, targets)
            optimizer.zero_grad()
            (loss * ranks).backward()
            losses.append(loss.detach())
            share = len(sizes) * ranks
            grads.append([None if p.grad is None else p.grad / share for p in model.parameters()])
        for parameter, grad in zip(model.parameters(), total(grads), strict=True):
            parameter.grad = grad
        whole.end_step(model, optimizer, first + step, sum(losses) / len(losses))
    whole.records = reference.join(parts)
    return whole
