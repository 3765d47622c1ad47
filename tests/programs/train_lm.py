"""Trains a small Llama on the source text of Python's standard library, sharded with FSDP2.

An ordinary script: torchrun --nproc-per-node 2 train_lm.py [STEPS]
"""

import gc
import pathlib
import sys
import sysconfig

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

BATCH, SEQ = 8, 128


def text() -> torch.Tensor:
    """Every byte of the standard library's top-level modules, in name order."""
    files = sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(f.read_bytes() for f in files)), dtype=torch.uint8)


def build() -> LlamaForCausalLM:
    """Four layers on bytes, from random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=SEQ, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def main(steps: int = 30) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    model = build()
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    data = text()
    generator = torch.Generator().manual_seed(rank)
    for step in range(steps):
        starts = torch.randint(0, len(data) - SEQ, (BATCH,), generator=generator)
        tokens = torch.stack([data[s : s + SEQ] for s in starts.tolist()]).long()
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        if rank == 0 and (step % 5 == 0 or step == steps - 1):
            print(f"step {step:3d}  loss {mean / world:.3f}", flush=True)
    del model, optimizer
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
