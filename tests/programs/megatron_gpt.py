"""megatron-core's GPTModel by megatron-core's own schedules: `megatron_gpt.py WAY...`, one by one.

1f1b         a stage on every rank
interleaved  two stages on every rank, in turn
tp           a stage on every two ranks, which share its layers by tensor parallelism
ddp          all of the model on every rank, in megatron-core's DDP, with its optimizer

As in megatron's training script a stage in the middle is called without tokens. What megatron-core asks of CUDA it gets
on the CPU.
"""

import contextlib
import sys
import types
import zlib

import parallel
import tiny
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.transformer import TransformerConfig
from torch.overrides import TorchFunctionMode

STEPS = 2
LAYERS = 4
MICRO, ROWS = 4, 2


class OnCpu(TorchFunctionMode):
    """Makes tensors there that are asked for on CUDA."""

    def __torch_function__(self, function, _types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if "cuda" in str(kwargs.get("device")):
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)


def without_cuda() -> None:
    torch.cuda.current_device = lambda: torch.device("cpu")
    tensor_parallel.get_cuda_rng_tracker = lambda: types.SimpleNamespace(fork=contextlib.nullcontext)


def build(tensor: int = 1, stages: int = 1, chunks: int = 1) -> list[GPTModel]:
    """This rank's chunks of the model, with the weights that they have in the whole of it."""
    config = TransformerConfig(
        num_layers=LAYERS, hidden_size=tiny.WIDTH, num_attention_heads=tiny.HEADS, hidden_dropout=0.0,
        attention_dropout=0.0, tensor_model_parallel_size=tensor, pipeline_model_parallel_size=stages,
        pipeline_dtype=torch.float32,
        virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None, deallocate_pipeline_outputs=True,
        use_cpu_initialization=True, batch_p2p_comm=False, gradient_accumulation_fusion=False, persist_layer_norm=False,
    )  # fmt: skip
    models = []
    for chunk in range(chunks):
        at = {"ignore_virtual": False, "vp_stage": chunk} if chunks > 1 else {}
        model = GPTModel(
            config, get_gpt_layer_local_spec(normalization="LayerNorm"), tiny.VOCAB, tiny.SEQ,
            pre_process=parallel_state.is_pipeline_first_stage(**at), share_embeddings_and_output_weights=False,
            post_process=parallel_state.is_pipeline_last_stage(**at), vp_stage=chunk if chunks > 1 else None,
        )  # fmt: skip
        for name, parameter in model.named_parameters():
            fill(name_in_whole(model, name), parameter)
        models.append(model)
    return models


def name_in_whole(model: GPTModel, name: str) -> str:
    if not name.startswith("decoder.layers."):
        return name
    decoder, layers, index, rest = name.split(".", 3)
    return f"{decoder}.{layers}.{model.decoder.layers[int(index)].layer_number - 1}.{rest}"


def fill(name: str, parameter: torch.nn.Parameter) -> None:
    """Gives a parameter, or this rank's piece of it, numbers that its name decides."""
    shape, cut = list(parameter.shape), getattr(parameter, "tensor_model_parallel", False)
    if cut:
        shape[parameter.partition_dim] *= parallel_state.get_tensor_model_parallel_world_size()
    whole = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode()))) * 0.1
    if cut:
        pieces = whole.chunk(parallel_state.get_tensor_model_parallel_world_size(), parameter.partition_dim)
        whole = pieces[parallel_state.get_tensor_model_parallel_rank()]
    parameter.data.copy_(whole + ("norm" in name and name.endswith("weight")))


def call(model: GPTModel, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The loss of each token on the last stage; what the stage gives on the others."""
    mask = torch.ones(1, 1, tiny.SEQ, tiny.SEQ, dtype=torch.bool).triu(1)
    positions = torch.arange(tiny.SEQ).expand(len(tokens), -1)
    stage = getattr(model, "module", model)
    first, last = stage.pre_process, stage.post_process
    return model(
        tokens if first else None, positions if first else None, mask, labels=targets.contiguous() if last else None
    )


def with_ddp(model: GPTModel):
    """The model in megatron-core's DDP, and the optimizer for it."""
    ddp = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    options = OptimizerConfig(optimizer="sgd", lr=0.1, sgd_momentum=0.0, weight_decay=0.0, clip_grad=0.0)
    optimizer = get_megatron_optimizer(options, [ddp])
    model.config.grad_scale_func = optimizer.scale_loss
    model.config.finalize_model_grads_func = finalize_model_grads
    return ddp, optimizer


def train(way: str) -> None:
    rank, world, tensor = dist.get_rank(), dist.get_world_size(), 2 if way == "tp" else 1
    stages, chunks = 1 if way == "ddp" else world // tensor, 2 if way == "interleaved" else 1
    parallel_state.initialize_model_parallel(tensor, stages, chunks if chunks > 1 else None)
    models = build(tensor, stages, chunks)
    if way == "ddp":
        models[0], optimizer = with_ddp(models[0])
    else:
        optimizer = torch.optim.SGD([p for model in models for p in model.parameters()], lr=0.1)
    # Where ranks share the batch, every microbatch has rows of all of them.
    mine = range(rank, MICRO, world) if way == "ddp" else range(MICRO)
    forward_backward = get_forward_backward_func()

    def loss_of(out: torch.Tensor):
        return out.mean(), {"loss": out.detach().mean()}

    def forward_step(batches, model):
        return call(model, *next(batches)), loss_of

    for step in range(STEPS):
        batches = [iter([tiny.batch(step, [ROWS] * MICRO, index) for index in mine]) for _ in models]
        if way == "ddp":
            models[0].zero_grad_buffer()
        optimizer.zero_grad()
        found = forward_backward(
            forward_step_func=forward_step, data_iterator=batches if chunks > 1 else batches[0],
            model=models if chunks > 1 else models[0], num_microbatches=len(mine), seq_length=tiny.SEQ,
            micro_batch_size=ROWS, forward_only=False,
        )  # fmt: skip
        optimizer.step()
        loss = torch.stack([each["loss"] for each in found]).mean() if found else torch.zeros(())
        if way == "ddp":
            dist.all_reduce(loss, dist.ReduceOp.SUM)
            loss /= world
        dist.broadcast(loss, src=world - 1)
        tiny.report(rank, step, loss)
    parallel_state.destroy_model_parallel()


def main(*ways: str) -> None:
    without_cuda()
    with OnCpu():
        for way in ways:
            train(way)


if __name__ == "__main__":
    parallel.launch(main, *sys.argv[1:])
