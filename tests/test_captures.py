"""How tests compare tensors that were summed in another order: no machine's order is wrong, and a wrong tensor is."""

import pytest
import torch

import captures

SIZES = (1e-6, 1e-3, 1.0, 30.0)
"""From gradients that are smaller than any fixed tolerance to logits."""


def addends(size: float) -> torch.Tensor:
    """Whose sum over the first dimension is a tensor of about this size."""
    return torch.randn(4, 8, 16, 64, generator=torch.Generator().manual_seed(0)) * size / 16


@pytest.fixture(params=SIZES)
def parts(request) -> torch.Tensor:
    return addends(request.param)


@pytest.fixture
def whole(parts) -> torch.Tensor:
    return parts.flatten(0, 1).sum(0)


def test_another_order_of_a_sum_is_close(parts, whole):
    other = parts.sum(1).flip(0).sum(0)
    assert captures.close(other, whole) and not captures.same_bytes(other, whole)


def test_an_element_near_zero_is_as_exact_as_the_sum_that_it_is(parts, whole):
    error = whole.abs().max().clamp(max=1.0) * 1.5e-6
    near = torch.where(whole.abs() == whole.abs().min(), torch.zeros_like(whole), whole)
    assert captures.close(torch.where(near == 0, error, near), near)


def swapped_rows(whole, _parts):
    return whole[torch.tensor([1, 0, *range(2, len(whole))])]


def a_row_of_zeros(whole, _parts):
    return whole * (torch.arange(len(whole)) != 3).unsqueeze(1)


def a_scaled_row(whole, _parts):
    return whole * torch.where(torch.arange(len(whole)) == 3, 1.001, 1.0).unsqueeze(1)


def one_element_of_another(whole, _parts):
    found = whole.clone()
    found[2, 5] = whole[3, 5]
    return found


def one_element_of_the_other_sign(whole, _parts):
    typical = (whole.abs() - whole.abs().median()).abs().argmin()
    return torch.where(torch.arange(whole.numel()).view_as(whole) == typical, -whole, whole)


def without_an_addend(_whole, parts):
    return parts.flatten(0, 1)[1:].sum(0)


def of_a_mean(whole, parts):
    return whole / len(parts)


def transposed(whole, _parts):
    return whole.flip(-1)


def not_a_number(whole, _parts):
    return torch.where(whole == whole.max(), torch.nan, whole)


def infinite(whole, _parts):
    return torch.where(whole == whole.max(), torch.inf, whole)


def of_another_type(whole, _parts):
    return whole.double()


def of_another_shape(whole, _parts):
    return whole.unsqueeze(0)


WRONG = (
    swapped_rows, a_row_of_zeros, a_scaled_row, one_element_of_another, one_element_of_the_other_sign,
    without_an_addend, of_a_mean, transposed, not_a_number, infinite, of_another_type, of_another_shape,
)  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.__name__)
def test_what_is_wrong_is_not_close(wrong, parts, whole):
    assert captures.close(whole, whole) and not captures.close(wrong(whole, parts), whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.complex64], ids=str)
def test_other_types_have_their_own_tolerance(dtype):
    whole = addends(1.0).sum((0, 1)).to(dtype)
    step = {torch.complex64: torch.float32}.get(dtype, dtype)
    assert captures.close(whole * (1 + torch.finfo(step).eps / 2), whole)
    assert not captures.close(whole * 1.05, whole)
    assert not captures.close(swapped_rows(whole, None), whole)


def test_integers_are_equal_or_not():
    whole = torch.arange(10**6, 10**6 + 8)
    assert captures.close(whole.clone(), whole)
    assert not captures.close(whole + (whole == whole.max()), whole)


def test_a_sum_that_is_zero_is_any_rounding_and_no_more():
    one, other = addends(1e-10)[0, :2].clamp(-9e-10, 9e-10)
    assert captures.close(one, other) and captures.close(one, torch.zeros_like(one))
    assert not captures.close(one * 100, other)
