"""A small causal language model and its data, shared by the training scripts beside it."""

import math

import torch
import torch.nn.functional as F
from torch import nn

VOCAB, WIDTH, HEADS, SEQ = 64, 32, 4, 12


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        batch, seq, width = x.shape
        q, k, v = self.qkv(x).view(batch, seq, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / math.sqrt(width // self.heads)
        mask = torch.ones(seq, seq, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(mask, float("-inf")).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(batch, seq, width))


class Mlp(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.up = nn.Linear(width, 4 * width)
        self.act = nn.GELU()
        self.down = nn.Linear(4 * width, width)

    def forward(self, x):
        return self.down(self.act(self.up(x)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Net(nn.Module):
    def __init__(self, layers: int = 2, width: int = WIDTH, heads: int = HEADS, vocab: int = VOCAB):
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.layers = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, vocab, bias=False)

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


def build(seed: int = 0, **sizes) -> Net:
    torch.manual_seed(seed)
    return Net(**sizes)


def loss_of(logits, targets):
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def batch(index: int, sizes: list[int], rank: int, seq: int = SEQ):
    """Slice `rank` of global batch number `index`; `sizes` are the rows of every rank."""
    generator = torch.Generator().manual_seed(1000 + index)
    rows = torch.randint(0, VOCAB, (sum(sizes), seq + 1), generator=generator)
    mine = rows.split(sizes)[rank]
    return mine[:, :-1].contiguous(), mine[:, 1:].contiguous()


def report(rank: int, step: int, loss) -> None:
    """Prints a loss with every bit of it."""
    if rank == 0:
        print(f"step {step} loss {float(loss.detach()).hex()}", flush=True)
