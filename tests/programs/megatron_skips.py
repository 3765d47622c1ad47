"""A model in bfloat16 and megatron-core's optimizer for it, which skips the step whose gradients are not finite."""

import parallel
import torch
from megatron.core import parallel_state
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer.grad_scaler import ConstantGradScaler
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from torch import nn
from torch.overrides import TorchFunctionMode

STEPS = 4
# The step whose gradients are not finite.
BROKEN = 2
SCALE = 4.0


class OnCpu(TorchFunctionMode):
    """Makes tensors there that are asked for on CUDA, and says that they are there."""

    def __torch_function__(self, function, _types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if "cuda" in str(kwargs.get("device")):
            kwargs["device"] = "cpu"
        result = function(*args, **kwargs)
        return result.replace("torch.", "torch.cuda.") if function is torch.Tensor.type and len(args) == 1 else result


def batch(step: int) -> torch.Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(step)).bfloat16()


def main() -> None:
    parallel_state.initialize_model_parallel(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)).bfloat16()
    with OnCpu():
        inner = torch.optim.SGD(model.parameters(), lr=0.5)
        config = OptimizerConfig(optimizer="sgd", lr=0.5, bf16=True, clip_grad=0.0)
        optimizer = Float16OptimizerWithFloat16Params(inner, config, ConstantGradScaler(SCALE), lambda *_: None)
        for step in range(STEPS):
            optimizer.zero_grad()
            loss = model(batch(step)).float().pow(2).mean() * (float("inf") if step == BROKEN else 1)
            optimizer.scale_loss(loss).backward()
            updated, *_ = optimizer.step()
            assert updated == (step != BROKEN)
            parallel.report(step, loss, 1)
    parallel_state.destroy_model_parallel()


if __name__ == "__main__":
    parallel.launch(main)
