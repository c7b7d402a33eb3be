"""The chosen-token log-probability and entropy against their plain twin and fp64 autograd."""

import math

import pytest
import torch

from consilience.model.kernels.linear_logprob import linear_logprob, linear_logprob_dense

torch.set_num_threads(1)


def inputs(n=11, V=23, D=5, dtype=torch.float64, scale=1.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = (torch.randn(n, D, generator=g, dtype=torch.float64) * scale).to(dtype).requires_grad_()
    head = torch.randn(V, D, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden, head, torch.randint(V, (n,), generator=g)


def test_two_tokens_worked_by_hand():
    hidden = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    head = torch.tensor([[0.0], [math.log(3.0)]], dtype=torch.float64)
    out = linear_logprob(hidden, head, torch.tensor([1, 0]))
    # Row 0 has p = (1/4, 3/4), row 1 has p = (1/2, 1/2).
    assert out.logprob.tolist() == pytest.approx([math.log(0.75), math.log(0.5)])
    assert out.entropy.tolist() == pytest.approx([0.25 * math.log(4) + 0.75 * math.log(4 / 3), math.log(2)])


@pytest.mark.parametrize("keep_bytes", [0, 2**20])
@pytest.mark.parametrize("chunk", [1, 4, 11, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
def test_values_and_gradients_equal_fp64_autograd_of_the_plain_twin(keep_bytes, chunk, temperature):
    hidden, head, target = inputs()
    upstream = torch.randn(2, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    ours = linear_logprob(hidden, head, target, chunk, temperature, keep_bytes=keep_bytes)
    twin = linear_logprob_dense(hidden, head, target, temperature)
    for x, y in zip(ours, twin):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-13)
    found = torch.autograd.grad(ours, (hidden, head), tuple(upstream))
    expected = torch.autograd.grad(twin, (hidden, head), tuple(upstream))
    for x, y in zip(found, expected):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("keep_bytes", [0, 2**20])
def test_gradcheck_through_both_outputs(keep_bytes):
    hidden, head, target = inputs(n=5, V=7, D=3)
    function = lambda h, w: linear_logprob(h, w, target[:5] % 7, 2, 1.3, keep_bytes=keep_bytes)
    assert torch.autograd.gradcheck(function, (hidden, head))


@pytest.mark.parametrize("only", ["hidden", "head"])
def test_a_frozen_side_gets_no_gradient_and_changes_nothing_for_the_other(only):
    hidden, head, target = inputs()
    expected = torch.autograd.grad(linear_logprob(hidden, head, target).logprob.sum(), (hidden, head))
    (head if only == "hidden" else hidden).requires_grad_(False)
    linear_logprob(hidden, head, target).logprob.sum().backward()
    assert torch.equal(hidden.grad, expected[0]) if only == "hidden" else torch.equal(head.grad, expected[1])
    assert (head.grad if only == "hidden" else hidden.grad) is None


def test_without_grad_the_result_is_the_same_and_has_no_graph():
    hidden, head, target = inputs()
    with torch.no_grad():
        out = linear_logprob(hidden, head, target, 3)
    assert not out.logprob.requires_grad and not out.entropy.requires_grad
    torch.testing.assert_close(
        out.logprob, linear_logprob(hidden, head, target, 3).logprob, rtol=0, atol=1e-14
    )


def test_fp32_stays_near_fp64_and_half_types_compute_in_fp32():
    hidden, head, target = inputs(n=64, V=600, D=32, dtype=torch.float32)
    exact = linear_logprob_dense(hidden.double(), head.double(), target)
    # fp32 logits of size about 20 carry 2e-6 of rounding each; the sum over 600 entries adds little.
    torch.testing.assert_close(
        linear_logprob(hidden, head, target).logprob.double(), exact.logprob, rtol=0, atol=2e-5
    )
    half = [x.detach().bfloat16().requires_grad_() for x in (hidden, head)]
    out = linear_logprob(*half, target)
    expected = linear_logprob(half[0].float(), half[1].float(), target)
    assert out.logprob.dtype == torch.float32 and torch.equal(out.logprob, expected.logprob)
    out.logprob.sum().backward()
    assert half[0].grad.dtype == half[1].grad.dtype == torch.bfloat16


def test_no_tokens_give_empty_outputs_and_zero_gradients():
    hidden, head, _ = inputs(n=0)
    out = linear_logprob(hidden, head, torch.zeros(0, dtype=torch.long))
    assert out.logprob.shape == out.entropy.shape == (0,)
    out.logprob.sum().backward()
    assert hidden.grad.shape == (0, 5) and not head.grad.any()


def test_extreme_logits_stay_finite():
    hidden, head, target = inputs(dtype=torch.float32, scale=1e15)
    out = linear_logprob(hidden, head, target)
    (out.logprob.sum() + out.entropy.sum()).backward()
    assert all(torch.isfinite(x).all() for x in (*out, hidden.grad, head.grad))
    assert (out.entropy >= 0).all()


def test_results_repeat_bit_for_bit():
    hidden, head, target = inputs(n=300, V=97, D=16, dtype=torch.float32)
    runs = [
        torch.autograd.grad(linear_logprob(hidden, head, target, 64).logprob.sum(), (hidden, head))
        for _ in "ab"
    ]
    assert all(torch.equal(x, y) for x, y in zip(*runs))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_ids": torch.tensor([0, 23])}, "run from 0 to 23"),
        ({"target_ids": torch.tensor([-1, 0])}, "run from -1 to 0"),
        ({"target_ids": torch.tensor([0])}, "must be"),
        ({"head": torch.zeros(23, 4)}, "same D"),
        ({"chunk_tokens": 0}, "chunk_tokens is 0"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
    ],
)
def test_wrong_arguments_are_refused_with_what_is_allowed(change, message):
    given = {
        "hidden": torch.zeros(2, 5),
        "head": torch.zeros(23, 5),
        "target_ids": torch.tensor([0, 1]),
    } | change
    with pytest.raises(ValueError, match=message):
        linear_logprob(**given)
