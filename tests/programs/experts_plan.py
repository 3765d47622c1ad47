"""A small Qwen3-MoE that transformers distributes by its own plans over four ranks, from what was saved in FOLDER:
`experts_plan.py FOLDER CASES...`, one by one.

`dispatched`: FSDP over all ranks, of which each two have experts of their own. `packed`: FSDP over two, pieces of
layers over the other two; an expert has two weights in one.
"""

import sys

import parallel
import tiny
import torch
import torch.distributed as dist
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.distributed import DistributedConfig

STEPS = 2
ROWS = 8
CASES = {
    "dispatched": {"fsdp_size": 4, "ep_size": 2},
    "packed": {"fsdp_size": 2, "tp_size": 2},
}


def build() -> Qwen3MoeForCausalLM:
    """The model that is saved."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=tiny.VOCAB, hidden_size=32, moe_intermediate_size=24, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, head_dim=8, num_experts=4, num_experts_per_tok=2, max_position_embeddings=tiny.SEQ,
        tie_word_embeddings=False,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config)


def loss_of(model, tokens, targets) -> torch.Tensor:
    return tiny.loss_of(model(input_ids=tokens, use_cache=False).logits, targets)


def main(folder: str, *cases: str) -> None:
    for case in cases:
        config = DistributedConfig(**CASES[case])
        model = Qwen3MoeForCausalLM.from_pretrained(folder, distributed_config=config, dtype=torch.float32).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)
        index = dist.get_rank() // config.tp_size
        for step in range(STEPS):
            tokens, targets = tiny.batch(step, [ROWS // config.fsdp_size] * config.fsdp_size, index)
            loss = loss_of(model, tokens, targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            parallel.report(step, loss, dist.get_world_size())


if __name__ == "__main__":
    parallel.launch(main, *sys.argv[1:])
