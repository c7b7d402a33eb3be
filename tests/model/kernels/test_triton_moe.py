"""The experts' kernels one by one, against sums and derivatives in fp64."""

import math

import pytest
import torch

from consilience.model.moe import gated

pytestmark = pytest.mark.triton
torch.set_num_threads(1)

BF16 = 2**-8  # largest relative error of rounding to bf16


@pytest.fixture(scope="module")
def kernels():
    pytest.importorskip("triton")
    from consilience.model.kernels import triton_moe

    return triton_moe


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def places(tokens, topk, seed=0):
    """A permutation of the pairs, as [R, K] int32."""
    order = torch.randperm(tokens * topk, generator=torch.Generator().manual_seed(seed))
    return order.view(tokens, topk).int()


@pytest.mark.parametrize(("tokens", "topk", "width"), [(3, 2, 8), (5, 6, 24), (1, 1, 2056), (0, 2, 8)])
def test_rows_go_to_their_places_and_come_back_as_sums(tokens, topk, width, kernels, triton_device):
    source, inverse = normal(tokens, width, dtype=torch.bfloat16), places(tokens, topk)
    out = kernels.expand(source.to(triton_device), inverse.to(triton_device)).cpu()
    assert torch.equal(out[inverse.flatten().long()], source.repeat_interleave(topk, 0))
    second, base = normal(*out.shape, seed=1, dtype=torch.bfloat16), normal(tokens, width, seed=2).bfloat16()
    out, second, base = (t.to(triton_device) for t in (out, second, base))
    inverse = inverse.to(triton_device)
    for more in ({}, {"base": base}, {"second": second}, {"base": base, "second": second}):
        found = kernels.combine(out, inverse, **more)
        expected = torch.zeros(tokens, width, device=triton_device)
        for k in range(topk):  # in the order of rank, in fp32: equal to the last bit
            expected += out[inverse[:, k].long()]
            if "second" in more:
                expected += second[inverse[:, k].long()]
        if "base" in more:
            expected += base
        assert torch.equal(found, expected.bfloat16())


def test_the_clamp_worked_by_hand(kernels, triton_device):
    gate, up = torch.tensor([[30.0, -30.0, 1.0, 1.0]]), torch.tensor([[1.0, 1.0, 30.0, -30.0]])
    one = 1 / (1 + math.exp(-1))
    expected = torch.tensor([[10 / (1 + math.exp(-10)), -30 / (1 + math.exp(30)), 10 * one, -10 * one]])
    gate, up = gate.to(triton_device), up.to(triton_device)
    torch.testing.assert_close(kernels.swiglu_forward(gate, up, 10.0).cpu(), expected)
    d_gate, d_up, _, _ = kernels.swiglu_backward(torch.ones_like(gate), gate, up, 10.0)
    assert d_gate[0, 0] == 0 and d_up[0, 2] == d_up[0, 3] == 0  # strictly beyond a limit
    d_gate, d_up, _, _ = kernels.swiglu_backward(*(torch.full((1, 1), 2.0, device=triton_device),) * 3, 2.0)
    assert d_gate.item() != 0 and d_up.item() != 0  # on it


@pytest.mark.parametrize("has_weights", [False, True])
@pytest.mark.parametrize(("tokens", "topk", "width"), [(3, 2, 8), (2, 3, 2100), (0, 2, 8)])
def test_swiglu_equals_the_twin_in_fp64_to_one_rounding(
    tokens, topk, width, has_weights, kernels, triton_device
):
    rows = tokens * topk
    gate, up, grad = (normal(rows, width, seed=s, dtype=torch.bfloat16) for s in range(3))
    weights, inverse = normal(tokens, topk, seed=3), places(tokens, topk)
    order = inverse.flatten().argsort().int()
    wide = [t.double().requires_grad_() for t in (gate, up, weights)]
    active = gated(wide[0], wide[1], 0.7)
    if has_weights:
        active = active * wide[2].flatten()[order.long()][:, None]
    expected = torch.autograd.grad((active * grad.double()).sum(), wide[: 2 + has_weights])
    given = [t.to(triton_device) for t in (gate, up, weights, order, grad)]
    more = (given[2], given[3]) if has_weights else ()
    found = kernels.swiglu_forward(given[0], given[1], 0.7, *more)
    close = {"rtol": BF16, "atol": 1e-6}
    torch.testing.assert_close(found.cpu().double(), active.detach(), **close)
    d_gate, d_up, again, d_weights = kernels.swiglu_backward(given[4], given[0], given[1], 0.7, *more)
    for a, b in zip((d_gate, d_up), expected):
        torch.testing.assert_close(a.cpu().double(), b, **close)
    assert has_weights is (d_weights is not None)
    if has_weights:
        assert torch.equal(again, found)
        size = math.sqrt(width)  # fp32 sums of `width` terms of size one
        torch.testing.assert_close(d_weights.cpu().double(), expected[2], rtol=1e-5, atol=1e-6 * size)


@pytest.mark.parametrize("counts", [[5, 0, 70], [0, 64, 0, 1], [0, 0]])
@pytest.mark.parametrize(("height", "width"), [(16, 24), (136, 8)])
def test_weight_gradients_are_added_in_fp32(counts, height, width, kernels, triton_device, monkeypatch):
    monkeypatch.setitem(kernels.WEIGHT_GRADIENT, "rows", 32)  # borders between tiles at these sizes
    monkeypatch.setitem(kernels.WEIGHT_GRADIENT, "columns", 32)
    rows = sum(counts)
    d_out, x = normal(rows, height, dtype=torch.bfloat16), normal(rows, width, seed=1, dtype=torch.bfloat16)
    start = normal(len(counts), height, width, seed=2)
    ends = torch.tensor(counts).cumsum(0).int().to(triton_device)
    pieces = zip(d_out.double().split(counts), x.double().split(counts))
    expected = start.double() + torch.stack([a.T @ b for a, b in pieces])
    totals = []
    for _ in range(2):
        total = start.clone().to(triton_device)
        kernels.add_weight_gradient(d_out.to(triton_device), x.to(triton_device), ends, total)
        totals.append(total.cpu())
    assert torch.equal(*totals)
    torch.testing.assert_close(totals[0].double(), expected, rtol=1e-5, atol=1e-5)  # 70 products in fp32
    for e, count in enumerate(counts):
        assert count or torch.equal(totals[0][e], start[e])
