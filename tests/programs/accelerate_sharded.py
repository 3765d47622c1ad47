"""Accelerate's own preparation for FSDP and DeepSpeed: `accelerate_sharded.py fsdp1|fsdp2|zero2|zero3...`.

On a CPU Accelerate takes these for plain data parallelism, whatever it is told. So the script gives it its plugin after
it has made up its mind.
"""

import sys

import parallel
import tiny
import torch
from accelerate import Accelerator, DeepSpeedPlugin, FullyShardedDataParallelPlugin, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

STEPS = 3


def told(how: str) -> Accelerator:
    """An Accelerator that prepares as it would on GPUs."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    state = accelerator.state
    for each in (state, PartialState()):  # an optimizer's wrapper asks the latter anew
        each.device = torch.device("cpu")  # without the number that FSDP1 refuses
        each.distributed_type = DistributedType.FSDP if how.startswith("fsdp") else DistributedType.DEEPSPEED
    if how.startswith("fsdp"):
        state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=int(how[-1]),
            reshard_after_forward="FULL_SHARD" if how == "fsdp1" else True,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["Block"],
            use_orig_params=True if how == "fsdp1" else None,
            cpu_ram_efficient_loading=False,
        )
    else:
        config = {
            "train_micro_batch_size_per_gpu": 4,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": int(how[-1]), "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
        }
        plugin = DeepSpeedPlugin(hf_ds_config=config)
        plugin.select(_from_accelerator_state=True)
        state.deepspeed_plugins = {"default": plugin}
        accelerator.deepspeed_engine_wrapped = None
    return accelerator


def train(how: str) -> None:
    accelerator = told(how)
    rank, world = accelerator.process_index, accelerator.num_processes
    model = tiny.build()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for step in range(STEPS):
        tokens, targets = tiny.batch(step, [4, 4], rank)
        loss = tiny.loss_of(model(tokens), targets)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        parallel.report(step, loss, world)
    if how.startswith("zero"):
        model.destroy()


def main(*ways: str) -> None:
    for how in ways:
        train(how)


if __name__ == "__main__":
    parallel.launch(main, *sys.argv[1:])
