"""`linear_logprob` through its Triton rows against the plain twin in fp64; on a GPU, or interpreted."""

import pytest
import torch

from consilience.model.kernels.gpu_linear_logprob import Plan, run
from consilience.model.kernels.linear_logprob import linear_logprob_dense

pytestmark = pytest.mark.triton
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch):
    """Blocks so small that a row of 300 has several, the last one partly filled."""
    from consilience.model.kernels import triton_logprob_rows

    monkeypatch.setattr(triton_logprob_rows, "LAUNCH", {"BLOCK": 128, "num_warps": 4})


def inputs(device, n=11, V=300, D=16, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden, head = torch.randn(n, D, generator=g), torch.randn(V, D, generator=g)
    target = torch.randint(V, (n,), generator=g)
    upstream = torch.randn(2, n, generator=g)
    return hidden.to(device).requires_grad_(), head.to(device).requires_grad_(), target.to(device), upstream


@pytest.mark.parametrize("keep_bytes", [0, 8 * 300 * 4, 2**24])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("which", ["logprob", "entropy", "both"])
def test_values_and_gradients_equal_fp64(keep_bytes, temperature, which, triton_device):
    hidden, head, target, upstream = inputs(triton_device, n=20)
    ours = run(hidden, head, target, Plan(8, temperature, keep_bytes, None))
    exact = [x.detach().double().cpu().requires_grad_() for x in (hidden, head)]
    twin = linear_logprob_dense(*exact, target.cpu(), temperature)
    for x, y in zip(ours, twin):
        torch.testing.assert_close(x.double().cpu(), y, rtol=2e-6, atol=1e-5)
    chosen = {"logprob": [0], "entropy": [1], "both": [0, 1]}[which]
    up = [upstream[i] for i in chosen]
    found = torch.autograd.grad([ours[i] for i in chosen], (hidden, head), [u.to(triton_device) for u in up])
    expected = torch.autograd.grad([twin[i] for i in chosen], exact, [u.double() for u in up])
    for x, y in zip(found, expected):  # fp32 sums of 20 to 300 products
        torch.testing.assert_close(x.double().cpu(), y, rtol=0, atol=2e-5 * y.abs().max().item())


def test_a_second_backward_gives_the_same(triton_device):
    hidden, head, target, upstream = inputs(triton_device)
    out = run(hidden, head, target, Plan(4, 1.0, 2**24, None))
    up = tuple(upstream.to(triton_device))
    first = torch.autograd.grad(out, (hidden, head), up, retain_graph=True)
    second = torch.autograd.grad(out, (hidden, head), up)
    assert all(torch.equal(x, y) for x, y in zip(first, second))


def test_what_is_kept_and_what_is_projected_again_agree_to_rounding(triton_device):
    hidden, head, target, upstream = inputs(triton_device, n=20)
    grads = []
    for keep in (0, 2**24):
        out = run(hidden, head, target, Plan(8, 1.3, keep, None))
        grads.append(torch.autograd.grad(out[0], (hidden, head), upstream[0].to(triton_device)))
    for x, y in zip(*grads):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-5 * y.abs().max().item())


def test_the_heads_gradient_may_be_added_in_place(triton_device):
    hidden, head, target, _ = inputs(triton_device)
    expected = torch.autograd.grad(run(hidden, head, target, Plan(4, 1.0, 2**24, None))[0].sum(), head)[0]
    total = torch.ones_like(head)
    run(hidden, head, target, Plan(4, 1.0, 2**24, total))[0].sum().backward()
    torch.testing.assert_close(total.detach() - 1, expected, rtol=0, atol=1e-5)
    assert head.grad is None and hidden.grad is not None


def test_no_tokens_give_empty_outputs_and_zero_gradients(triton_device):
    hidden, head, target, _ = inputs(triton_device, n=0)
    out = run(hidden, head, target, Plan(4, 1.0, 2**24, None))
    (out[0].sum() + out[1].sum()).backward()
    assert out[0].shape == (0,) and hidden.grad.shape == (0, 16) and not head.grad.any()


@pytest.mark.parametrize("V", [300, 128, 7])
def test_log_softmax_is_that_of_fp64_and_of_a_target_what_the_row_pass_finds(V, triton_device):
    from consilience.model.kernels import triton_logprob_rows as rows

    g = torch.Generator().manual_seed(2)
    logits = (5 * torch.randn(9, V, generator=g)).to(triton_device)
    target = torch.randint(V, (9,), generator=g).to(triton_device)
    found = rows.log_softmax(logits)
    # fp32 roundings of numbers below 32, and of a logarithm
    torch.testing.assert_close(found.double(), logits.double().log_softmax(-1), rtol=0, atol=1e-5)
    for u in (None, torch.empty_like(logits)):  # as a reference and as a policy that is trained
        logprob, _ = rows.summary(rows.row_pass(logits, target, 1.0, u))
        assert torch.equal(logprob, found.gather(1, target[:, None])[:, 0])


def test_a_row_has_the_same_bits_in_any_company_and_at_any_place(triton_device):
    from consilience.model.kernels import triton_logprob_rows as rows

    g = torch.Generator().manual_seed(4)
    logits = torch.randn(300, 130, generator=g).to(triton_device)
    target = torch.randint(130, (300,), generator=g).to(triton_device)
    whole, statistics = rows.log_softmax(logits), rows.row_pass(logits, target, 1.0, None)
    for first, last in ((0, 1), (299, 300), (17, 18), (100, 133), (231, 300)):
        part = logits[first:last].clone()  # a row of 130 does not begin where vectors do
        assert torch.equal(rows.log_softmax(part), whole[first:last])
        found = rows.row_pass(part, target[first:last], 1.0, None)
        assert torch.equal(found, statistics[first:last])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_in_exact_mode_the_trainer_reads_what_the_sampler_reads(temperature, triton_device):
    """Products and rows in exact mode's order, on both sides; gradients are those of the fast mode."""
    from consilience.model import exact
    from consilience.model.kernels import triton_logprob_rows as rows

    hidden, head, target, upstream = inputs(triton_device, n=20)
    with exact.exact_mode():
        trained = run(hidden, head, target, Plan(8, temperature, 2**24, None, True))
        heat = torch.full((20, 1), temperature, device=hidden.device)
        sampled = [rows.log_softmax(exact.logits(h, head.detach()) / t) for h, t in
                   zip(hidden.detach().split(3), heat.split(3))]  # fmt: skip
    assert torch.equal(torch.cat(sampled).gather(1, target[:, None])[:, 0], trained[0])
    up = tuple(upstream.to(triton_device))
    fast = run(hidden, head, target, Plan(8, temperature, 2**24, None))
    for x, y in zip(*(torch.autograd.grad(out, (hidden, head), up) for out in (trained, fast))):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-5 * y.abs().max().item())
