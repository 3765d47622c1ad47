"""Two DeepSpeed engines, both made before either is called, as actor and critic are: `engines.py STAGE[-offload]...`.

Of the second one's model some parameters are frozen.
"""

import sys

import deepspeed
import parallel
import torch
import torch.distributed as dist
from torch import nn

STEPS = 2
ROWS = 4
FROZEN = {"0.weight"}


def build() -> list[nn.Module]:
    """Both models."""
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        models.append(nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4)))
    for name, parameter in models[1].named_parameters():
        parameter.requires_grad_(name not in FROZEN)
    return models


def batch(step: int, rank: int) -> torch.Tensor:
    return torch.randn(ROWS, 8, generator=torch.Generator().manual_seed(10 * step + rank))


def losses_of(models, x: torch.Tensor) -> list[torch.Tensor]:
    """One for each model."""
    return [(model(x) - number).square().mean() for number, model in enumerate(models)]


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)


def engine_of(model: nn.Module, stage: str, offload: str):
    zero: dict = {"stage": int(stage), "stage3_param_persistence_threshold": 0}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    config = {
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    return deepspeed.initialize(model=model, optimizer=optimizer_of(model), config=config)[0]


def train(variant: str) -> None:
    engines = [engine_of(model, *variant.partition("-")[::2]) for model in build()]
    for step in range(STEPS):
        losses = losses_of(engines, batch(step, dist.get_rank()))
        for engine, loss in zip(engines, losses, strict=True):
            engine.backward(loss)
        for engine in reversed(engines):
            engine.step()
        parallel.report(step, sum(losses), dist.get_world_size())
    for engine in engines:
        engine.destroy()


def main(*variants: str) -> None:
    for variant in variants:
        train(variant)


if __name__ == "__main__":
    deepspeed.init_distributed("gloo")
    parallel.launch(main, *sys.argv[1:])
