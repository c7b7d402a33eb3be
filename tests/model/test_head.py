"""Logits of half-precision weights are fp32; in exact mode they have the trainer's bits."""

import pytest
import torch

from consilience.model import exact
from consilience.model.exact import exact_mode, log_softmax
from consilience.model.head import Head
from consilience.model.kernels.linear_logprob import linear_logprob

torch.set_num_threads(1)

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
HALVES = [torch.bfloat16, torch.float16]


def head_and_hidden(dtype, device="cpu", width=40, vocab=72):
    g = torch.Generator().manual_seed(0)
    head = Head(width, vocab, dtype)
    with torch.no_grad():
        head.weight.copy_(torch.randn(vocab, width, generator=g))
    return head.to(device), torch.randn(3, 5, width, generator=g).to(device, dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", HALVES)
def test_a_sum_that_half_precision_cannot_hold_is_kept(dtype, device):
    head = Head(8, 8, dtype).to(device)
    with torch.no_grad():
        head.weight.fill_(1.0)
    hidden = torch.tensor([[4096.0, 1.0, 0.25, 0, 0, 0, 0, 0]], dtype=dtype, device=device)
    for wants_grad in (False, True):
        with torch.set_grad_enabled(wants_grad):
            assert head(hidden).tolist() == [[4097.25] * 8]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64])
def test_logits_and_gradients_equal_fp64_to_the_rounding_of_fp32(dtype, device):
    head, hidden = head_and_hidden(dtype, device)
    hidden.requires_grad_()
    wide, weight = (x.detach().double().requires_grad_() for x in (hidden, head.weight))
    expected = wide @ weight.T
    with torch.no_grad():
        quiet = head(hidden)
    logits = head(hidden)
    assert logits.dtype == quiet.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # Sums of 40 products err by at most 40 · 2^-24 of their magnitudes' sum, some 30 here.
    for found in (logits, quiet):
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=40 * 2**-24 * 60)
    found = torch.autograd.grad(logits.square().sum(), (hidden, head.weight))
    for ours, right in zip(found, torch.autograd.grad(expected.square().sum(), (wide, weight))):
        assert ours.dtype == dtype
        assert (ours.double() - right).norm() <= max(torch.finfo(dtype).eps, 1e-6) * right.norm()


def test_wide_weights_go_the_way_of_every_projection():
    head, hidden = head_and_hidden(torch.float32)
    assert torch.equal(head(hidden), torch.nn.functional.linear(hidden, head.weight))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_in_exact_mode_sampler_and_trainer_agree_to_the_last_bit(dtype, device):
    head, hidden = head_and_hidden(dtype, device)
    ids = torch.arange(15, device=device)
    flat = hidden.flatten(0, 1)
    with exact_mode(), torch.no_grad():
        logits = head(hidden).flatten(0, 1)
        assert torch.equal(logits, exact.linear(flat.float(), head.weight.float()))
        sampled = log_softmax(logits).gather(1, ids[:, None])[:, 0]
        alone = torch.cat([head(row[None]) for row in flat])
        trained = linear_logprob(flat, head.weight, ids).logprob
    assert torch.equal(alone, logits) and torch.equal(sampled, trained)
