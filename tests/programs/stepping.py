"""What ends a step: optimizers of all sorts in one process, one after the other; or none at all."""

import gc
import sys
from collections import OrderedDict

import torch
from torch import nn

ITERATIONS = 4
# The iteration whose gradients are not finite.
BROKEN = 2


def layers(name):
    """A model of which `name` is the first layer."""
    torch.manual_seed(0)
    return nn.Sequential(OrderedDict({name: nn.Linear(8, 4), "act": nn.Tanh(), f"{name}_end": nn.Linear(4, 1)}))


def batch(step):
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(step))


def sample(model):
    """A pass in training mode that trains nothing."""
    with torch.no_grad():
        return model(batch(99))


def scaled():
    """Two evaluations before there is an optimizer; then a GradScaler that skips an iteration."""
    model = layers("scaled")
    for _ in range(2):
        sample(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for iteration in range(ITERATIONS):
        sample(model)
        loss = model(batch(iteration)).pow(2).mean() * (float("inf") if iteration == BROKEN else 1)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        yield loss


def fused():
    """The same with an optimizer that unscales, and skips, by itself."""
    model = layers("fused")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for iteration in range(ITERATIONS):
        loss = model(batch(iteration)).pow(2).mean() * (float("inf") if iteration == BROKEN else 1)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        yield loss


def turns():
    """Two optimizers that step in turn, as a GAN's do."""
    maker, judge = layers("maker"), layers("judge")
    maker.append(nn.Linear(1, 8))
    make, judging = (torch.optim.SGD(model.parameters(), lr=0.05) for model in (maker, judge))
    for iteration in range(ITERATIONS):
        loss = judge(batch(iteration)).mean() - judge(maker(batch(50 + iteration)).detach()).mean()
        judging.zero_grad()
        loss.backward()
        judging.step()
        yield loss
        loss = judge(maker(batch(60 + iteration))).mean()
        make.zero_grad()
        loss.backward()
        make.step()
        yield loss


def stored():
    """A checkpoint makes the optimizer's state before the first step."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model = layers("stored")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    for iteration in range(2):
        sample(model)
        if iteration == 0:
            get_optimizer_state_dict(model, optimizer)
        loss = model(batch(iteration)).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss


def inside():
    """An optimizer a parameter, each of which steps in the backward pass."""
    model = layers("inside")
    for parameter in model.parameters():
        optimizer = torch.optim.SGD([parameter], lr=0.05)

        def step(parameter, optimizer=optimizer):
            optimizer.step()
            optimizer.zero_grad()

        parameter.register_post_accumulate_grad_hook(step)
    for iteration in range(2):
        loss = model(batch(iteration)).pow(2).mean()
        loss.backward()
        yield loss


def phases():
    """Two optimizers, and then another one in the place of both."""
    model, other = layers("phased"), layers("other")
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.05) for each in (model, other)]
    for iteration in range(2 + ITERATIONS):
        if iteration == 2:
            optimizers.clear()
            gc.collect()
            optimizers.append(torch.optim.SGD(model.parameters(), lr=0.05))
        loss = model(batch(iteration)).pow(2).mean() + other(batch(iteration)).pow(2).mean()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        yield loss


def by_hand():
    """Updates by hand, and an evaluation after each; the first is before any."""
    model = layers("by_hand")
    sample(model)
    for iteration in range(ITERATIONS):
        loss = model(batch(iteration)).pow(2).mean()
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.05 * parameter.grad
                parameter.grad = None
        sample(model)
        yield loss


def inference():
    """Passes that nothing follows, also of a model that torch.compile traces backward."""
    model = layers("inference").eval()
    for iteration in range(12):
        with torch.no_grad():
            yield model(batch(iteration)).mean()
    compiled = torch.compile(layers("compiled"), backend="aot_eager")
    for iteration in range(4):
        yield compiled(batch(iteration)).mean()
    # torch.jit knows torch's functions by what they are.
    yield torch.jit.script(slope)(torch.ones(2))


def slope(x: torch.Tensor) -> torch.Tensor:
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad([(x * x).sum()], [x])
    assert gradient is not None
    return gradient.mean()


TRAINED = (scaled, fused, turns, stored, inside, phases)

if __name__ == "__main__":
    torch.set_num_threads(1)
    for case in TRAINED if sys.argv[1] == "trained" else (globals()[sys.argv[1]],):
        print("LOSSES", *(float(loss.detach()).hex() for loss in case()))
