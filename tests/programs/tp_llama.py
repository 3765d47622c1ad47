"""A small Llama split over two ranks by transformers' own plan, from a checkpoint saved first: `tp_llama.py FOLDER`."""

import pathlib
import sys

import parallel
import tiny
import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

STEPS = 2
ROWS = 4


def build() -> LlamaForCausalLM:
    """The model that is saved."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tiny.VOCAB, hidden_size=32, intermediate_size=88, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=tiny.SEQ, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def loss_of(model, tokens, targets) -> torch.Tensor:
    return tiny.loss_of(model(input_ids=tokens, use_cache=False).logits, targets)


def main(folder: str) -> None:
    if dist.get_rank() == 0:
        build().save_pretrained(pathlib.Path(folder))
    dist.barrier()
    model = LlamaForCausalLM.from_pretrained(folder, tp_plan="auto", dtype=torch.float32).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(STEPS):
        tokens, targets = tiny.batch(step, [ROWS], 0)
        loss = loss_of(model, tokens, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        tiny.report(dist.get_rank(), step, loss)


if __name__ == "__main__":
    parallel.launch(main, sys.argv[1])
