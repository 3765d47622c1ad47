"""megatron-core's GPTModel by megatron-core's own schedules: `megatron_gpt.py WAY...`, one by one.

1f1b         a stage on every rank
interleaved  two stages on every rank, in turn
tp           a stage on every two ranks, which share its layers by tensor parallelism
whole        all of the model on every rank, microbatches accumulated

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
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
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
    first, last = model.pre_process, model.post_process
    return model(
        tokens if first else None, positions if first else None, mask, labels=targets.contiguous() if last else None
    )


def train(way: str) -> None:
    world, tensor = dist.get_world_size(), 2 if way == "tp" else 1
    stages, chunks = 1 if way == "whole" else world // tensor, 2 if way == "interleaved" else 1
    parallel_state.initialize_model_parallel(tensor, stages, chunks if chunks > 1 else None)
    models = build(tensor, stages, chunks)
    optimizer = torch.optim.SGD([p for model in models for p in model.parameters()], lr=0.1)
    forward_backward = get_forward_backward_func()

    def loss_of(out: torch.Tensor):
        return out.mean(), {"loss": out.detach().mean()}

    def forward_step(batches, model: GPTModel):
        return call(model, *next(batches)), loss_of

    for step in range(STEPS):
        batches = [iter([tiny.batch(step, [ROWS] * MICRO, micro) for micro in range(MICRO)]) for _ in models]
        optimizer.zero_grad()
        with OnCpu():
            found = forward_backward(
                forward_step_func=forward_step, data_iterator=batches if chunks > 1 else batches[0],
                model=models if chunks > 1 else models[0], num_microbatches=MICRO, seq_length=tiny.SEQ,
                micro_batch_size=ROWS, forward_only=False,
            )  # fmt: skip
        optimizer.step()
        loss = torch.stack([each["loss"] for each in found]).mean() if found else torch.zeros(())
        dist.broadcast(loss, src=world - 1)
        tiny.report(dist.get_rank(), step, loss)
    parallel_state.destroy_model_parallel()


def main(*ways: str) -> None:
    without_cuda()
    for way in ways:
        train(way)


if __name__ == "__main__":
    parallel.launch(main, *sys.argv[1:])
