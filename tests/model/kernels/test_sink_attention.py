"""Sink attention against its plain twin and fp64 autograd, at odd sizes, and its edge cases."""

import math

import pytest
import torch

from consilience.model.kernels.sink_attention import sink_attention, sink_attention_dense

torch.set_num_threads(1)

NONE = float("-inf")


def inputs(rows=2, tokens=6, heads=3, width=5, sizes=((2, 4), (1, 7)), dtype=torch.float64, seed=0):
    """query, parts [(keys, bias)] with sizes (blocks, S), sink; about a third of the keys masked."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)
    parts = []
    for blocks, size in sizes:
        bias = torch.zeros(rows, tokens, size).masked_fill_(
            torch.rand(rows, tokens, size, generator=g) < 0.3, NONE
        )
        parts.append((draw(rows, blocks, size, width).requires_grad_(), bias))
    return draw(rows, tokens, heads, width).requires_grad_(), parts, draw(heads).requires_grad_()


def leaves(query, parts, sink):
    return [query, sink, *(k for k, _ in parts)]


def test_one_key_and_the_sink_worked_by_hand():
    # score 2·3·0.5 = 3, sink 3: the key gets one half, and is the value too.
    query, keys = torch.tensor(2.0).view(1, 1, 1, 1), torch.tensor(3.0).view(1, 1, 1, 1)
    out, (p,) = sink_attention(query, [(keys, torch.zeros(1, 1, 1))], torch.tensor([3.0]), 0.5)
    assert out.item() == pytest.approx(1.5) and p.item() == pytest.approx(0.5)
    out, (p,) = sink_attention(query, [(keys, torch.zeros(1, 1, 1))], torch.tensor([0.0]), 0.5)
    assert p.item() == pytest.approx(math.exp(3) / (math.exp(3) + 1))


@pytest.mark.parametrize(
    ("tokens", "heads", "width", "sizes"),
    [
        (6, 3, 5, ((2, 4), (1, 7))),
        (1, 1, 1, ((1, 1),)),
        (1, 4, 8, ((1, 9), (1, 3))),
        (15, 2, 3, ((5, 3), (1, 1), (3, 11))),
        (4, 3, 2, ((4, 2),)),
    ],
)
def test_output_and_gradients_equal_the_plain_twin_at_odd_sizes(tokens, heads, width, sizes):
    case = inputs(3, tokens, heads, width, sizes)
    ours, probabilities = sink_attention(*case, 0.7)
    twin = sink_attention_dense(*case, 0.7)
    torch.testing.assert_close(ours, twin, rtol=0, atol=1e-13)
    upstream = torch.randn(ours.shape, dtype=torch.float64)
    for a, b in zip(*(torch.autograd.grad(y, leaves(*case), upstream) for y in (ours, twin))):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert [p.shape[-1] for p in probabilities] == [size for _, size in sizes]
    assert not any(p.requires_grad for p in probabilities)
    total = sum(p.sum(-1) for p in probabilities)
    assert (total < 1).all()  # the sink holds the rest
    for p, (_, bias) in zip(probabilities, case[1]):
        assert not p[(bias == NONE)[:, :, None].expand_as(p)].any()


@pytest.mark.parametrize("sizes", [((1, 9), (1, 3)), ((1, 1),), ((1, 64), (1, 130))])
def test_a_decode_step_without_gradient_equals_the_plain_twin(sizes):
    """One query a row takes a path of its own; probabilities too must be those of the other."""
    case = inputs(5, 1, 4, 8, sizes)
    with torch.no_grad():
        ours, probabilities = sink_attention(*case, 0.7)
    twin, expected = sink_attention(*case, 0.7)
    torch.testing.assert_close(ours, sink_attention_dense(*case, 0.7).detach(), rtol=0, atol=1e-13)
    torch.testing.assert_close(ours, twin.detach(), rtol=0, atol=1e-13)
    for got, wanted in zip(probabilities, expected):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-13)


def test_gradcheck():
    query, parts, sink = inputs(1, 4, 2, 3, ((2, 3), (1, 2)))
    biases = [b for _, b in parts]
    function = lambda q, s, *keys: sink_attention(q, list(zip(keys, biases)), s, 0.6)[0]
    assert torch.autograd.gradcheck(function, (query, sink, *(k for k, _ in parts)))


def test_a_query_that_sees_no_key_attends_to_the_sink_alone_and_outputs_zero():
    query, parts, sink = inputs()
    parts = [(k, torch.full_like(b, NONE)) for k, b in parts]
    out, probabilities = sink_attention(query, parts, sink, 0.7)
    assert not out.any() and not any(p.any() for p in probabilities)
    out.sum().backward()
    assert not any(x.grad.any() for x in leaves(query, parts, sink))


def test_large_logits_stay_finite():
    query, parts, sink = inputs(dtype=torch.float32)
    out, _ = sink_attention(query * 1e4, parts, sink * 1e4, 1.0)
    out.sum().backward()
    assert out.isfinite().all() and all(x.grad.isfinite().all() for x in leaves(query, parts, sink))


def test_two_runs_are_bit_equal_forward_and_backward():
    case = inputs(4, 33, 4, 16, ((3, 23), (1, 13)), torch.float32)
    runs = []
    for _ in range(2):
        out, _ = sink_attention(*case, 0.25)
        runs.append([out, *torch.autograd.grad(out.square().sum(), leaves(*case))])
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_strides_do_not_matter():
    query, parts, sink = inputs()
    strided = query.detach().transpose(1, 2).contiguous().transpose(1, 2)
    keys = [(k.detach().transpose(1, 2).contiguous().transpose(1, 2), b) for k, b in parts]
    assert torch.equal(
        sink_attention(strided, keys, sink, 0.7)[0], sink_attention(query, parts, sink, 0.7)[0]
    )


def test_inputs_are_left_as_they_were():
    case = inputs(dtype=torch.float32)
    before = [x.detach().clone() for x in leaves(*case)]
    sink_attention(*case, 0.7)[0].sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(before, leaves(*case)))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 0.03)])
def test_narrow_types_stay_near_fp64(dtype, bound):
    """fp32: sums of a dozen terms near 1. bf16: logits below 8 rounded to 2^-6 move a weight by 1.5 %."""
    query, parts, sink = inputs(dtype=dtype)
    wide = [(k.double(), b) for k, b in parts]
    out, _ = sink_attention(query, parts, sink, 0.4)
    assert out.dtype == dtype
    exact = sink_attention_dense(query.double(), wide, sink.double(), 0.4)
    assert (out.double() - exact).abs().max() < bound * exact.abs().max()
