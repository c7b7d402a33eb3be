"""In bf16, experts round where DeepSeek's code does: against experts written out token by token."""

from dataclasses import replace

import pytest
import torch
from test_moe import CONFIG, filled
from torch.nn.functional import silu

from consilience.model.moe import MoE, gated

torch.set_num_threads(1)


def test_bf16_projections_are_multiplied_in_fp32_and_their_gradients_come_back_in_bf16():
    g = torch.Generator().manual_seed(0)
    gate, up = (3 * torch.randn(2, 50, generator=g)).bfloat16().unbind(0)
    narrow = [x.clone().requires_grad_() for x in (gate, up)]
    wide = [x.float().requires_grad_() for x in (gate, up)]
    found, expected = gated(*narrow, 2.5), gated(*wide, 2.5)
    assert torch.equal(found, expected)  # fp32 both
    ours, theirs = (torch.autograd.grad(y.square().sum(), x) for y, x in ((found, narrow), (expected, wide)))
    assert all(torch.equal(a, b.bfloat16()) for a, b in zip(ours, theirs))


def eighths(g, *shape, top=16):
    """Multiples of 1/8 below top/8: sums of their products are exact in fp32, in whatever order."""
    return torch.randint(-top, top + 1, shape, generator=g) / 8


@pytest.mark.parametrize("layer", [0, 1])
def test_bf16_experts_round_where_deepseek_rounds_and_nowhere_else(layer):
    """Projections to bf16, once before w2, once at the end; in between fp32 (specification 9)."""
    g = torch.Generator().manual_seed(0)
    config = replace(CONFIG, hidden_size=16, swiglu_limit=1.0)
    moe = filled(MoE(config, layer, torch.bfloat16))
    with torch.no_grad():
        for p in (*moe.experts.parameters(), *moe.shared_experts.parameters()):
            p.copy_(eighths(g, *p.shape, top=4))
    hidden, ids = eighths(g, 40, 16).bfloat16(), torch.randint(11, (40,), generator=g)
    weights, chosen, _ = moe.gate(hidden, ids)

    def expert(x, w1, w2, w3, weight=1.0):
        gate, up = (w1.float() @ x.float()).bfloat16(), (w3.float() @ x.float()).bfloat16()
        active = silu(gate.float().clamp(max=1)) * up.float().clamp(-1, 1) * weight
        down = w2.double() @ active.bfloat16().double()
        return down.float().bfloat16().float()

    expected, shared = (
        [],
        [w.weight for w in (moe.shared_experts.w1, moe.shared_experts.w2, moe.shared_experts.w3)],
    )
    for x, share, experts in zip(hidden, weights, chosen.tolist()):
        stacked = [(moe.experts.w1[e], moe.experts.w2[e], moe.experts.w3[e]) for e in experts]
        routed = [expert(x, *w, s) for w, s in zip(stacked, share)]
        expected.append((routed[0] + routed[1] + expert(x, *shared)).bfloat16())
    found = moe(hidden, ids)
    assert found.dtype == torch.bfloat16
    # A sum of w2 lies near a tie in one of a hundred: fp32 sums in another order then round otherwise.
    different = found != torch.stack(expected)
    assert different.float().mean() < 0.01
    found.float().square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in moe.parameters() if p.requires_grad)
