"""Parameters that are packed or quantized, each as some library keeps them, beside others that only look like it."""

import warnings

import tiny
import torch
import torch.nn.functional as F
from torch import nn

WIDTH = 8
STEPS = 2


class State:
    """How a weight was quantized."""

    def __init__(self, scale: torch.Tensor):
        self.absmax = scale


class Params4bit(nn.Parameter):
    """As bitsandbytes': two codes in a byte."""

    def __new__(cls, codes, state):
        self = torch.Tensor._make_subclass(cls, codes, False)
        self.quant_state = state
        return self


class Wrapper(torch.Tensor):
    """As torchao's: it says that it is a float tensor, and its inside is codes, which it gives where it is detached."""

    @staticmethod
    def __new__(cls, codes, scale):
        self = torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)
        self.codes, self.scale, self._is_param = codes, scale, True
        return self

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return args[0].codes
        return function(*(a.codes * a.scale if isinstance(a, cls) else a for a in args), **(kwargs or {}))


class Named(nn.Parameter):
    """A class of the job's own, of ordinary numbers."""


def frozen(value: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)


def codes(shape: tuple[int, ...] = (WIDTH, WIDTH), dtype: torch.dtype = torch.int8) -> torch.Tensor:
    return torch.randint(0, 9, shape, dtype=torch.int64).to(dtype)


class Layer(nn.Module):
    """Adds a weight to what it is given, `read(self)`."""

    def __init__(self, weight, read, **own):
        super().__init__()
        self.register_parameter("weight", None)
        if weight is not None:
            self._parameters["weight"] = weight
        self.read = read
        for name, value in own.items():
            if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def forward(self, x):
        return torch.tanh(F.linear(x, self.read(self)))


def packed() -> dict[str, Layer]:
    """Whose elements are codes."""
    scale = torch.tensor(0.1)
    halves, whole = codes((WIDTH * WIDTH // 2, 1), torch.uint8), (WIDTH, WIDTH)

    def unpacked(raw: torch.Tensor) -> torch.Tensor:
        return torch.stack([raw >> 4, raw & 15], 1).reshape(whole).float() * scale

    eight = Params4bit(codes(), None)
    eight.CB, eight.SCB = codes(), scale
    quantized = torch.quantize_per_tensor(torch.randn(whole), 0.1, 0, torch.qint8)
    return {
        "four": Layer(Params4bit(halves, State(scale)), lambda m: unpacked(m.weight.data)),
        "eight": Layer(eight, lambda m: m.weight.data.float() * m.weight.SCB),
        # What is packed into 16 bits lets wrappers shard it like other weights; the layer knows it, too.
        "sixteen": Layer(
            frozen(halves.flatten().view(torch.bfloat16)), lambda m: unpacked(m.weight.data.view(torch.uint8)),
            quant_state=State(scale),
        ),
        "meta": Layer(frozen(codes()), lambda m: m.weight.float() * m.meta["scale"], meta={"scale": scale}),
        "buffer": Layer(frozen(codes()), lambda m: m.weight.float() * m.scale, scale=scale),
        "float8": Layer(
            frozen(torch.randn(whole).to(torch.float8_e4m3fn)), lambda m: m.weight.float() * m.scale, scale=scale
        ),
        "ao": Layer(frozen(quantized), lambda m: m.weight.dequantize()),
        "wrapper": Layer(Wrapper(codes(), scale), lambda m: m.weight.codes * m.weight.scale),
        "sparse": Layer(frozen(torch.eye(WIDTH).to_sparse_csr()), lambda m: m.weight.to_dense()),
    }  # fmt: skip


def plain() -> dict[str, Layer]:
    """Whose elements are what they are."""
    whole = (WIDTH, WIDTH)
    tagged = Named(torch.randn(whole))
    tagged.scale = torch.ones(1)
    return {
        "table": Layer(frozen(codes(dtype=torch.int64)), lambda m: m.weight.float()),
        "mask": Layer(frozen(torch.rand(whole) > 0.5), lambda m: m.weight * m.scale, scale=torch.ones(1)),
        "scaled": Layer(
            frozen(torch.randn(whole).to(torch.float8_e4m3fn)), lambda m: m.weight.float() * m.scale,
            scale=nn.Parameter(torch.ones(1)),
        ),
        "named": Layer(tagged, lambda m: m.weight),
        "gptq": Layer(None, lambda m: m.qweight.float() * m.scale, qweight=codes(), scale=torch.tensor(0.1)),
    }  # fmt: skip


def build() -> nn.Sequential:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of sparse tensors
        layers = packed() | plain()
    model = nn.Sequential()
    for name, layer in layers.items():
        model.add_module(name, layer)
    model.add_module("last", nn.Linear(WIDTH, 1))
    return model


def batch(step: int) -> torch.Tensor:
    return torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(step))


def main() -> None:
    torch.set_num_threads(1)
    model = build()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for step in range(STEPS):
        loss = model(batch(step)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        tiny.report(0, step, loss)


if __name__ == "__main__":
    main()
