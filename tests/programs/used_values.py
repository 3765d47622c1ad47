"""Training in which the job's own hooks change what torch uses, after FlexModel has put its own there.

With `watch`, the values that torch uses are seen by hooks that come after those of the job.
"""

from collections import OrderedDict

import torch
from torch import nn

STEPS = 3
# The step from which the job has hooks of its own.
HOOKED = 1
SCALE = 1024.0


def batch(step):
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(step))


def layers(name):
    """A model of which `name` is the first layer."""
    return nn.Sequential(OrderedDict({name: nn.Linear(8, 4), "act": nn.Tanh(), f"{name}_end": nn.Linear(4, 1)}))


class Clamped(nn.Module):
    """Clamps the gradient of an activation by a hook on it."""

    def __init__(self):
        super().__init__()
        self.clamped, self.clamped_end = nn.Linear(8, 4), nn.Linear(4, 1)

    def forward(self, x):
        h = self.clamped(x)
        if h.requires_grad:
            h.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))
        return self.clamped_end(h.tanh())


def patch(model):
    """Hooks that change an output and an input."""
    model.patched.register_forward_hook(lambda module, args, out: out * 0.5)
    model.act.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    model.act.register_forward_hook(lambda module, args, kwargs, out: out.neg(), with_kwargs=True)


def clip(optimizer, args, kwargs):
    nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1e-3)


def train(name, watch=lambda model, optimizer, step: None):
    """Trains one of the models; the losses."""
    torch.manual_seed(0)
    model = Clamped() if name == "clamped" else layers(name)
    fused = name in ("fused", "attacked")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, fused=fused)
    if name == "clipped":
        optimizer.register_step_pre_hook(clip)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=1, enabled=fused)
    losses = []
    for step in range(STEPS):
        if name == "patched" and step == HOOKED:
            patch(model)
        watch(model, optimizer, step)
        x = batch(step)
        if name == "attacked":
            x = x.requires_grad_()
            (gradient,) = torch.autograd.grad(model(x).pow(2).mean(), x)
            x = (x + 0.1 * gradient.sign()).detach()
        loss = model(x).pow(2).mean()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(float(loss.detach()).hex())
    return losses


CASES = ("patched", "clamped", "clipped", "fused", "attacked")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for case in CASES:
        print("LOSSES", *train(case))
