"""Several models in one script: a student, its averaged teacher, a part called directly, one late, one rebuilt."""

import copy

import tiny
import torch
from torch import nn


def main() -> None:
    student = tiny.build()
    teacher = copy.deepcopy(student).eval()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    critic, late_step = None, 1
    for step in range(3):
        tokens, targets = tiny.batch(step, [4], 0)
        if step == late_step:
            torch.manual_seed(7)
            critic = nn.Sequential(nn.Linear(tiny.VOCAB, 8), nn.ReLU(), nn.Linear(8, 1))
        if step == 2:
            # Rebuilt halfway, as a script that grows its model does; the old one is dropped.
            grown = tiny.build(seed=1, layers=3)
            grown.load_state_dict(student.state_dict(), strict=False)
            student = grown
            optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        logits = student(tokens)
        with torch.no_grad():
            goal = teacher(tokens)
        loss = tiny.loss_of(logits, targets) + 0.1 * (logits - goal).square().mean()
        if critic is not None:
            loss = loss + critic(logits).mean()
        # A part of the model, called directly.
        part = student.layers[0].mlp(torch.ones(2, tiny.WIDTH))
        loss = loss + part.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for mean, new in zip(teacher.parameters(), student.parameters(), strict=False):
                if mean.shape == new.shape:
                    mean.lerp_(new, 0.1)
        tiny.report(0, step, loss)


if __name__ == "__main__":
    main()
