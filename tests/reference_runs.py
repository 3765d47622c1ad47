"""The programs' training loops once more, in one process, with every rank's slice of the batch run one after another.

The slices have the shapes that the ranks see and the gradients of two ranks are added once, so the results are equal
to the distributed job's to the last bit. `whole=True` runs the global batch at once instead: equal to rounding only,
and the yardstick for what a *whole* tensor and its gradient are.
"""

import itertools

import tiny
import torch

import reference


def language(model, step: int, sizes: list[int], rank: int):
    """The loss of a rank's slice of a batch, as the programs with tiny.py's data have it."""
    tokens, targets = tiny.batch(step, sizes, rank)
    return tiny.loss_of(model(tokens), targets)


def data_parallel(model, wanted, *, steps: int, sizes=(4, 4), whole: bool = False, loss_of=language):
    """Records of `parallel.train`, and its losses."""
    recorders = [reference.Recorder(model, wanted)]
    slices = [[sum(sizes)]] if whole else [list(sizes)]
    world = len(slices[0])
    parts: list[dict] = [{} for _ in range(world)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for step in range(steps):
        total, grads = 0.0, None
        for rank in range(world):
            recorders[0].found = parts[rank]
            recorders[0].forward_pass(step)
            loss = loss_of(model, step, slices[0], rank)
            optimizer.zero_grad()
            loss.backward()
            mine = [p.grad / world for p in model.parameters()]
            grads = mine if grads is None else [a + b for a, b in zip(grads, mine, strict=True)]
            total = total + loss.detach()
        for parameter, grad in zip(model.parameters(), grads, strict=True):
            parameter.grad = grad
        optimizer.step()
        losses.append(float(total / world).hex())
    return reference.join(parts), losses


def accumulated(model, wanted):
    """Records of `accumulate.py`, and its losses."""
    import accumulate

    world = len(accumulate.SIZES)
    recorder = reference.Recorder(model, wanted)
    parts: list[dict] = [{} for _ in range(world)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for step in range(accumulate.STEPS):
        total, grads = 0.0, None
        for rank in range(world):
            recorder.found = parts[rank]
            optimizer.zero_grad()
            for micro in range(accumulate.MICRO):
                index = step * accumulate.MICRO + micro
                tokens, targets = tiny.batch(index, accumulate.SIZES, rank)
                recorder.forward_pass(step, micro)
                loss = tiny.loss_of(model(tokens), targets) / accumulate.MICRO
                loss.backward()
                if micro == 1:
                    # After step 0 two evaluations came before this one.
                    _evaluate(model, recorder, rank, step * accumulate.MICRO, step, 2 if step else 0)
            mine = [p.grad / world for p in model.parameters()]
            grads = mine if grads is None else [a + b for a, b in zip(grads, mine, strict=True)]
            total = total + loss.detach()
        for parameter, grad in zip(model.parameters(), grads, strict=True):
            parameter.grad = grad
        optimizer.step()
        for rank in range(world):
            recorder.found = parts[rank]
            for extra in (1, 2):
                _evaluate(model, recorder, rank, step * accumulate.MICRO + extra, step + 1, extra - 1)
        losses.append(float(total / world).hex())
    return reference.join(parts), losses


def _evaluate(model, recorder, rank: int, index: int, step: int, micro: int) -> None:
    import accumulate

    recorder.forward_pass(step, micro, train=False)
    model.eval()
    with torch.no_grad():
        model(tiny.batch(100 + index, accumulate.SIZES, rank)[0])
    model.train()


def until(steps: int, width: int = tiny.WIDTH) -> list[str]:
    """The losses of the first steps of `until.py`."""
    import until

    return [float(loss.detach()).hex() for loss in itertools.islice(until.losses(width), steps)]


def single(model, wanted, batch, loss_of, *, steps: int):
    """Records of a one-process program, and its losses."""
    recorder = reference.Recorder(model, wanted)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for step in range(steps):
        recorder.forward_pass(step)
        loss = loss_of(model, *batch(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()).hex())
    return recorder.found, losses
