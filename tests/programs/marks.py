"""Two ranks whose parameters say `tensor_model_parallel`, as DeepSpeed's and others' do, without megatron-core."""

import tiny
import torch
import torch.distributed as dist
from torch import nn

STEPS = 2


def build(rank: int) -> nn.Module:
    torch.manual_seed(rank)
    model = nn.Sequential(nn.Linear(4, 2), nn.LayerNorm(2))
    for parameter in model.parameters():
        parameter.tensor_model_parallel = parameter.sequence_parallel = True
    return model


def train(model: nn.Module, rank: int, watch=lambda step: None) -> None:
    """`watch` is told a step when its gradients are there."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = model(torch.ones(3, 4) * (step + rank)).square().sum()
        loss.backward()
        watch(step)
        optimizer.step()
        tiny.report(rank, step, loss)


def main() -> None:
    dist.init_process_group("gloo")
    train(build(dist.get_rank()), dist.get_rank())
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
