"""Modules that return tensors of every element type and of every unusual form."""

import tiny
import torch
from torch import nn

DTYPES = [
    "float64", "float32", "float16", "bfloat16",
    "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu",
    "int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool",
    "complex128", "complex64", "complex32",
]  # fmt: skip


class Cast(nn.Module):
    def __init__(self, dtype: str):
        super().__init__()
        self.dtype = getattr(torch, dtype)

    def forward(self, x):
        return x.to(self.dtype)


class Form(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.form = form

    def forward(self, x):
        return self.form(x)


FORMS = {
    "empty": lambda x: x[:0],
    "empty_inside": lambda x: x.new_zeros(3, 0, 2),
    "scalar": lambda x: x.sum(),
    "transposed": lambda x: x.t(),
    "strided": lambda x: x[::2, 1::3],
    "expanded": lambda x: x[:1].expand(5, x.shape[1]),
    "offset": lambda x: x.flatten()[7:],
    "conjugate": lambda x: torch.complex(x, x + 1).conj(),
    "negative": lambda x: torch.complex(x, x + 1).conj().imag,
    "many_dims": lambda x: x[:1, :1].reshape([1] * 12),
    "channels_last": lambda x: x.reshape(1, 2, 4, 6).to(memory_format=torch.channels_last),
    "sparse": lambda x: x.relu().to_sparse(),
    "csr": lambda x: x.relu().to_sparse_csr(),
    "nested": lambda x: torch.nested.nested_tensor([x[0], x[1, :2]]),
    "meta": lambda x: x.to("meta"),
}


class Everything(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.cast = nn.ModuleDict({f"to_{name}": Cast(name) for name in DTYPES})
        self.form = nn.ModuleDict({name: Form(form) for name, form in FORMS.items()})

    def forward(self, x):
        x = x * self.scale
        for cast in self.cast.values():
            cast(x)
        for form in self.form.values():
            form(x.detach())
        return x.square().mean()


def batch(step: int):
    """Numbers that every element type can hold: 0 to 3.5 in halves."""
    return ((torch.arange(48).reshape(8, 6) + step) % 8) / 2


def main(steps: int = 2) -> None:
    model = Everything()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(steps):
        loss = model(batch(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        tiny.report(0, step, loss)


if __name__ == "__main__":
    main()
