"""The router's kernels against `Gate`, and pairs sorted by expert against a stable sort."""

import math
from dataclasses import replace

import pytest
import torch

from consilience.model.config import TINY
from consilience.model.kernels import gpu_moe
from consilience.model.moe import Gate

pytestmark = pytest.mark.triton
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def kernels():
    pytest.importorskip("triton")
    from consilience.model.kernels import triton_route

    return triton_route


def gate_of(experts, topk, is_hash, device, width=24, vocab=11):
    config = replace(
        TINY,
        hidden_size=width,
        vocab_size=vocab,
        n_routed_experts=experts,
        num_experts_per_tok=topk,
        routed_scaling_factor=1.7,
    )
    gate, g = Gate(config, is_hash=is_hash, dtype=torch.bfloat16), torch.Generator().manual_seed(0)
    with torch.no_grad():
        gate.weight.copy_(torch.randn(experts, width, generator=g))
        if is_hash:
            gate.tid2eid.copy_(torch.rand(vocab, experts, generator=g).argsort(1)[:, :topk])
        else:
            gate.bias.copy_(0.3 * torch.randn(experts, generator=g))
    return gate.to(device)


def test_weights_and_choice_worked_by_hand(kernels, triton_device):
    """softplus(log(e^s - 1)) = s: scores 2, 1, 3; a bias of 3 lifts the second over the first."""
    logits = torch.tensor([[4.0, 1.0, 9.0]]).expm1().log().to(triton_device)
    bias = torch.tensor([0.0, 3.0, 0.0], device=triton_device)
    weights, experts, scores = kernels.gate_forward(logits, bias, None, 2, 2.5)
    torch.testing.assert_close(scores.cpu(), torch.tensor([[2.0, 1.0, 3.0]]))
    assert experts.tolist() == [[1, 2]]
    torch.testing.assert_close(weights.cpu(), torch.tensor([[2.5 / 4, 7.5 / 4]]))


@pytest.mark.parametrize("is_hash", [False, True])
@pytest.mark.parametrize(("experts", "topk"), [(5, 2), (16, 6), (3, 3), (96, 1)])
def test_router_equals_the_twin_forward_and_backward(experts, topk, is_hash, triton_device):
    gate = gate_of(experts, topk, is_hash, triton_device)
    g = torch.Generator().manual_seed(1)
    hidden = torch.randn(7, 24, generator=g).bfloat16().to(triton_device).requires_grad_()
    ids = torch.randint(11, (7,), generator=g).to(triton_device)
    up_w, up_s = (torch.randn(7, n, generator=g).to(triton_device) for n in (topk, experts))
    found = []
    for forward in (lambda: gate(hidden, ids), lambda: gpu_moe.route(gate, hidden, ids)):
        weights, chosen, scores = forward()
        gradients = torch.autograd.grad((weights * up_w).sum() + (scores * up_s).sum(), (hidden, gate.weight))
        found.append((weights, chosen, scores, *gradients))
    twin, ours = found
    assert torch.equal(ours[1], twin[1])
    for a, b in ((ours[0], twin[0]), (ours[2], twin[2])):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # fp32 sums of 24 in another order
    for a, b in zip(ours[3:], twin[3:]):  # bf16 both: an ulp, 2**-7, where the fp32 sums straddle a tie
        torch.testing.assert_close(a, b, rtol=2**-7, atol=1e-5)


def test_a_gradient_of_weights_or_scores_alone_is_enough(triton_device):
    gate = gate_of(5, 2, False, triton_device)
    hidden = torch.randn(3, 24).bfloat16().to(triton_device).requires_grad_()
    ids = torch.zeros(3, dtype=torch.long, device=triton_device)
    both = torch.autograd.grad(sum(x.sum() for x in gpu_moe.route(gate, hidden, ids)[::2]), gate.weight)[0]
    alone = [torch.autograd.grad(gpu_moe.route(gate, hidden, ids)[n].sum(), gate.weight)[0] for n in (0, 2)]
    torch.testing.assert_close(both.float(), alone[0].float() + alone[1].float(), rtol=2**-6, atol=1e-3)


def test_prescribed_experts_are_taken_and_the_others_chosen(triton_device):
    gate = gate_of(6, 2, False, triton_device)
    hidden = torch.randn(5, 24).bfloat16().to(triton_device)
    ids = torch.zeros(5, dtype=torch.long, device=triton_device)
    fixed = torch.tensor([[0, 1], [-1, -1], [5, 4], [-1, -1], [2, 0]], device=triton_device)
    ours, twin = gpu_moe.route(gate, hidden, ids, fixed), gate(hidden, ids, fixed)
    assert torch.equal(ours[1], twin[1]) and ours[1][2].tolist() == [5, 4]
    torch.testing.assert_close(ours[0], twin[0], rtol=1e-5, atol=1e-6)


def test_of_equal_scores_the_lowest_expert_is_chosen(kernels, triton_device):
    logits = torch.tensor([[1.0, 2.0, 2.0, 1.0, 2.0], [0.0] * 5], device=triton_device)
    _, experts, _ = kernels.gate_forward(logits, None, None, 4, 1.0)
    assert experts.tolist() == [[1, 2, 4, 0], [0, 1, 2, 3]]


def test_logits_of_any_size_give_scores_and_slopes_of_fp64(kernels, triton_device):
    logits = torch.tensor([[-80.0, -40.0, -17.0, -3.0, -1e-3, 0.0, 2.0, 19.9, 20.1, 500.0]])
    wide = logits.double().requires_grad_()
    expected = torch.nn.functional.softplus(wide, threshold=1e9).sqrt()
    slope = torch.autograd.grad(expected.sum(), wide)[0]
    here = logits.to(triton_device)
    _, experts, scores = kernels.gate_forward(here, None, None, 1, 1.0)
    torch.testing.assert_close(scores.cpu().double(), expected.detach(), rtol=2e-6, atol=0)  # 2**-23 a step
    found = kernels.gate_backward(here, experts, None, torch.ones_like(scores), 1.0)
    torch.testing.assert_close(found.cpu().double(), slope, rtol=4e-6, atol=0)
    far = torch.tensor([[-1000.0, 1.0]], device=triton_device)
    _, experts, scores = kernels.gate_forward(far, None, None, 2, 1.0)
    slopes = kernels.gate_backward(far, experts, torch.ones(1, 2, device=triton_device), scores, 1.0)
    assert slopes.isfinite().all() and math.isclose(scores[0, 0].item(), 0, abs_tol=1e-15)


@pytest.mark.parametrize(
    ("tokens", "topk", "experts"), [(0, 2, 5), (1, 1, 1), (7, 2, 5), (70, 6, 40), (1500, 6, 3)]
)
def test_sorting_equals_a_stable_sort_also_where_experts_get_nothing(
    tokens, topk, experts, kernels, triton_device
):
    g = torch.Generator().manual_seed(tokens)
    chosen = torch.randint(experts, (tokens, topk), generator=g) // 2 * 2 % experts  # odd ones stay empty
    order, inverse, ends = kernels.sort_pairs(chosen.to(triton_device), experts)
    expected = chosen.flatten().argsort(stable=True)
    assert torch.equal(order.cpu().long(), expected)
    assert torch.equal(inverse.flatten().cpu().long()[expected], torch.arange(tokens * topk))
    assert torch.equal(ends.cpu().long(), torch.bincount(chosen.flatten(), minlength=experts).cumsum(0))
    assert {t.dtype for t in (order, inverse, ends)} == {torch.int32} and inverse.shape == chosen.shape
