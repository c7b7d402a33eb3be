"""A wave of experts by Triton and grouped GEMMs against its twin, and the exchange around it on one rank."""

from types import SimpleNamespace

import pytest
import torch

from consilience.model import expert_wave
from consilience.model.expert_exchange import Shard, _backward, _forward
from consilience.model.kernels import gpu_expert_wave
from consilience.model.ranks import ALONE, Ranks

torch.set_num_threads(1)

T, D, INNER, E, K = 9, 16, 24, 5, 2
LIMIT = 50.0  # no value near it: on its other side, by a rounding, the gradient is another one
ROUNDINGS = 0.015  # five roundings of 2**-9 to bf16 on the way, each at random: about 1 %


def masters(device):
    g = torch.Generator().manual_seed(0)
    shapes = ((E, INNER, D), (E, D, INNER), (E, INNER, D))
    return tuple((0.3 * torch.randn(s, generator=g)).bfloat16().to(device) for s in shapes)


def choices(device, num_tokens=T):
    """hidden, upstream gradient [T, D] bf16, weights [T, K] fp32, experts [T, K]; expert 1 gets no token."""
    g = torch.Generator().manual_seed(num_tokens)
    hidden, grad = (torch.randn(num_tokens, D, generator=g).bfloat16().to(device) for _ in range(2))
    experts = torch.tensor([0, 2, 3, 4])[torch.rand(num_tokens, 4, generator=g).argsort(1)[:, :K]]
    return hidden, grad, torch.rand(num_tokens, K, generator=g).to(device), experts.to(device)


def exact(*tensors):
    return tuple(x.cpu().double() if x.is_floating_point() else x.cpu() for x in tensors)


def near(found, expected):
    assert found.shape == expected.shape
    assert (found.cpu().double() - expected).norm() <= ROUNDINGS * expected.norm()


def test_the_cpu_and_other_types_keep_the_twin():
    hidden, w1 = torch.zeros(0, D, dtype=torch.bfloat16), masters("cpu")[0]
    assert not gpu_expert_wave.is_available(hidden, w1, E, K)
    if torch.cuda.is_available():
        hidden, w1 = hidden.cuda(), w1.cuda()
        assert gpu_expert_wave.is_available(hidden, w1, E, K)  # also without a token: all ranks go one way
        assert not gpu_expert_wave.is_available(hidden.float(), w1.float(), E, K)
        assert not gpu_expert_wave.is_available(hidden, w1, gpu_expert_wave.gpu_moe.MOST_EXPERTS + 1, K)


@pytest.mark.triton
@pytest.mark.parametrize("num_tokens", [T, 0])
def test_pairs_stand_and_are_summed_as_by_the_twin(num_tokens, triton_device):
    hidden, _, _, experts = choices(triton_device, num_tokens)
    order, places, counts = gpu_expert_wave.sort(experts, E)
    expected = expert_wave.sort(experts.cpu(), E)
    for found, other in zip((order, places, counts), expected):
        assert torch.equal(found.cpu().long(), other)
    rows = gpu_expert_wave.spread(hidden, order, places)
    assert torch.equal(rows.cpu(), expert_wave.spread(hidden.cpu(), *expected[:2]))
    total = gpu_expert_wave.sums(rows, places, hidden)
    near(total, (K + 1) * hidden.cpu().double())
    near(gpu_expert_wave.gradient_sums(rows, places, experts), K * hidden.cpu().double())


@pytest.mark.triton
def test_a_wave_is_as_near_to_fp64_as_roundings_allow_forward_and_backward(triton_device):
    hidden, grad, weights, experts = choices(triton_device)
    own, shares, numbers = masters(triton_device), weights[:, 0].contiguous(), experts[:, 0].contiguous()
    found, kept = gpu_expert_wave.forward(hidden, shares, numbers, own, LIMIT)
    wide = exact(hidden, shares, numbers)
    near(found, expert_wave.forward(*wide, exact(*own), LIMIT)[0])
    wanted, totals = (True, True, True), (None, torch.ones(E, D, INNER, device=triton_device), None)
    back = gpu_expert_wave.Backward(grad, (hidden, shares, numbers, own, LIMIT), kept, wanted)
    truth = expert_wave.Backward(exact(grad)[0], (*wide, exact(*own), LIMIT), (), wanted)
    near(back.d_rows, truth.d_rows)
    near(back.d_shares, truth.d_shares)
    d_w1, d_w2, d_w3 = back.of_masters(wanted, totals)
    expected = truth.of_masters(wanted, totals)
    assert d_w2 is None  # it went into the total
    for ours, theirs in zip((d_w1, totals[1] - 1, d_w3), expected):
        near(ours, theirs)
    assert not d_w1[1].any()


@pytest.mark.triton
@pytest.mark.parametrize("num_tokens", [T, 0])
@pytest.mark.parametrize("num_waves", [1, 2, 5])
def test_the_exchange_goes_through_it_wave_by_wave(num_tokens, num_waves, triton_device):
    hidden, grad, weights, experts = choices(triton_device, num_tokens)
    ranks = Ranks(device=torch.device(triton_device))
    results = []
    for way, given in ((gpu_expert_wave, (hidden, weights)), (expert_wave, exact(hidden, weights))):
        own = masters(triton_device) if way is gpu_expert_wave else exact(*masters("cpu"))
        experts = experts.to(given[0].device)
        shard = Shard(ranks if way is gpu_expert_wave else ALONE, E, num_waves)
        output, *kept = _forward(way, shard, LIMIT, *given, experts, given[0], own)
        ctx = SimpleNamespace(shard=shard, way=way, dtype=given[0].dtype, limit=LIMIT, totals=(None,) * 3)
        ctx.saved_tensors = (experts, *own, *kept)
        results.append((output, *_backward(ctx, grad.to(given[0]), [True, True, True])))
    for found, expected in zip(*results):
        near(found, expected)
