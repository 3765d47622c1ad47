"""Goes backward through one graph twice, and then through a part of it."""

import torch
import uses


def main() -> None:
    torch.manual_seed(0)
    model = uses.Thrice(exact=False)
    x = torch.randn(4, uses.WIDTH, dtype=torch.double, requires_grad=True)
    y = model(x * 1)
    y.sum().backward(retain_graph=True)
    y.sum().backward(retain_graph=True)
    torch.autograd.grad(y.sum(), model.q)
    print("gradient", x.grad.sum().item().hex())


if __name__ == "__main__":
    main()
