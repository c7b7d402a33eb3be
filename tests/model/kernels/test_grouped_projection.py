"""The grouped projection against the sum it stands for, values and gradients."""

import pytest
import torch

from consilience.model.kernels.grouped_projection import grouped_projection

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("shape", [(5, 3, 7, 4), (1, 2, 8, 8), (64, 1, 16, 3), (0, 2, 4, 4)])
def test_values_and_gradients_are_those_of_a_product_a_group(shape):
    tokens, groups, inner, outer = shape
    g = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, groups, inner, generator=g, dtype=torch.float64).to(DEVICE).requires_grad_()
    weight = torch.randn(groups, outer, inner, generator=g, dtype=torch.float64).to(DEVICE).requires_grad_()
    upstream = torch.randn(tokens, outer, groups, generator=g, dtype=torch.float64).to(DEVICE).transpose(1, 2)
    ours, plain = grouped_projection(x, weight), torch.einsum("rgi,goi->rgo", x, weight)
    assert ours.is_contiguous()
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-12)
    found = torch.autograd.grad(ours, (x, weight), upstream)
    expected = torch.autograd.grad(plain, (x, weight), upstream)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert found[0].is_contiguous()


def test_a_frozen_side_gets_no_gradient():
    x, weight = torch.randn(4, 2, 3, requires_grad=True), torch.randn(2, 5, 3)
    grouped_projection(x, weight).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(1).expand(4, 2, 3))
