"""The whole mixture of experts by Triton and grouped GEMMs against the modules in model/moe.py."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from consilience.model.config import TINY
from consilience.model.kernels import gpu_moe
from consilience.model.moe import MoE
from consilience.model.recompute import NAMES, Recompute

torch.set_num_threads(1)

CONFIG = replace(
    TINY, hidden_size=16, vocab_size=11, n_routed_experts=5, num_experts_per_tok=2,
    moe_intermediate_size=24, swiglu_limit=1.5,
)  # fmt: skip


def moe_of(layer, device, config=CONFIG, dtype=torch.bfloat16):
    moe, g = MoE(config, layer, dtype), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in moe.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=g))
        for b in moe.buffers():
            table = torch.rand(b.shape[0], config.n_routed_experts, generator=g)
            b.copy_(table.argsort(1)[:, : b.shape[1]])
    return moe.to(device)


def given(tokens, device, config=CONFIG):
    g = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, config.hidden_size, generator=g).bfloat16().to(device)
    return hidden.requires_grad_(), torch.randint(config.vocab_size, (tokens,), generator=g).to(device)


def run(moe, hidden, ids):
    """What `MoE.forward` does on a GPU."""
    weights, experts, _ = gpu_moe.route(moe.gate, hidden, ids)
    shared = gpu_moe.shared_expert(moe.shared_experts, hidden)
    masters = moe.experts.weights()
    return gpu_moe.routed_experts(hidden, weights, experts, masters, moe.experts.limit, shared)


def learned(moe):
    return [p for p in moe.parameters() if p.requires_grad]


def test_the_cpu_other_types_and_odd_widths_keep_the_twin():
    experts = torch.zeros(4, 16, 8, dtype=torch.bfloat16)
    assert not gpu_moe.is_available(torch.zeros(3, 8, dtype=torch.bfloat16), experts, 2)
    if torch.cuda.is_available():
        hidden = torch.zeros(3, 8, dtype=torch.bfloat16, device="cuda")
        assert gpu_moe.is_available(hidden, experts.cuda(), 2)
        assert not gpu_moe.is_available(hidden[:0], experts.cuda(), 2)
        assert not gpu_moe.is_available(hidden.float(), experts.cuda().float(), 2)
        assert not gpu_moe.is_available(hidden[:, :4], experts.cuda()[..., :4], 2)


@pytest.mark.triton
@pytest.mark.parametrize("tokens", [1, 6, 20])
@pytest.mark.parametrize("layer", [0, 7])
def test_outputs_and_gradients_are_as_near_to_fp64_as_the_twin_s(layer, tokens, triton_device):
    # No value near the clamp: on its other side, by a rounding, the gradient is another one.
    config = replace(CONFIG, num_hash_layers=1, swiglu_limit=50.0)
    moe = moe_of(layer, triton_device, config)
    hidden, ids = given(tokens, triton_device, config)
    upstream = torch.randn(tokens, 16, generator=torch.Generator().manual_seed(9)).to(triton_device)
    exact = moe_of(layer, "cpu", config).double()
    wide = hidden.detach().cpu().double().requires_grad_()
    # The choice is that of fp32 scores: a tie in fp64 would be another function.
    chosen = gpu_moe.route(moe.gate, hidden, ids)[1].cpu()
    scores = torch.nn.functional.softplus(wide @ exact.gate.weight.T).sqrt().gather(1, chosen)
    weights = scores / scores.sum(-1, keepdim=True) * exact.gate.scaling
    truth = exact.experts(wide, weights, chosen)[0] + exact.shared_experts(wide)
    expected = torch.autograd.grad((truth * upstream.cpu().double()).sum(), [wide, *learned(exact)])
    errors = []
    for forward in (run, lambda m, h, i: m(h, i)):
        if triton_device == "cuda" and forward is not run:
            continue  # there `MoE.forward` is this path itself
        out = forward(moe, hidden, ids)
        assert out.dtype == torch.bfloat16
        found = torch.autograd.grad((out.float() * upstream).sum(), [hidden, *learned(moe)])
        pairs = zip((out.detach(), *found), (truth.detach(), *expected))
        errors.append([float((a.cpu().double() - b).norm() / (1e-9 + b.norm())) for a, b in pairs])
    # Five roundings of 2**-9 to bf16 on the way, each at random: about 1 %.
    assert max(errors[0]) < 0.015
    for ours, twin in zip(errors[0], errors[-1]):
        assert ours < 1.5 * twin + 1e-3


@pytest.mark.triton
def test_two_runs_give_the_same_bits(triton_device):
    moe = moe_of(7, triton_device)
    hidden, ids = given(12, triton_device)
    runs = []
    for _ in range(2):
        out = run(moe, hidden, ids)
        runs.append([out, *torch.autograd.grad(out.float().square().sum(), [hidden, *learned(moe)])])
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@pytest.mark.triton
def test_masters_with_a_main_grad_get_sums_in_fp32_and_none_from_autograd(triton_device):
    moe = moe_of(7, triton_device)
    masters = (moe.experts.w1, moe.experts.w2, moe.experts.w3)
    hidden, ids = given(8, triton_device)
    run(moe, hidden, ids).float().square().sum().backward()
    expected = [w.grad.float() for w in masters]
    for w in masters:
        w.grad, w.main_grad = None, torch.ones(w.shape, device=triton_device)
    for _ in range(2):
        run(moe, hidden, ids).float().square().sum().backward()
    for w, once in zip(masters, expected):
        assert w.grad is None
        # The gradients of one call were rounded to bf16 above.
        torch.testing.assert_close(
            w.main_grad, 1 + 2 * once, rtol=2**-8, atol=2**-8 * float(once.abs().max())
        )


@pytest.mark.triton
def test_only_what_wants_a_gradient_gets_one(triton_device):
    moe = moe_of(7, triton_device)
    hidden, ids = given(9, triton_device)
    out = run(moe, hidden, ids)
    full = torch.autograd.grad(out.float().square().sum(), [hidden, moe.experts.w2])
    for p in (moe.experts.w1, moe.experts.w3, *moe.gate.parameters()):
        p.requires_grad_(False)
    out = run(moe, hidden, ids)
    assert torch.equal(torch.autograd.grad(out.float().square().sum(), moe.experts.w2)[0], full[1])
    with torch.no_grad():
        assert not run(moe, hidden, ids).requires_grad


@pytest.mark.triton
@pytest.mark.parametrize("again", [(), ("router",), ("expert_activations",), tuple(NAMES)])
def test_what_a_policy_computes_again_changes_no_bit(again, triton_device):
    moe, calls = moe_of(7, triton_device), []
    hidden, ids = given(6, triton_device)
    layout = SimpleNamespace(trace=None)

    def forward(streams, token_ids, _layout, _state):
        calls.append(1)
        return run(moe, streams, token_ids)

    grads = []
    for out in (run(moe, hidden, ids), Recompute(frozenset(again)).run(forward, hidden, ids, layout)):
        grads.append([out, *torch.autograd.grad(out.float().square().sum(), [hidden, *learned(moe)])])
    assert len(calls) == 2 and all(torch.equal(a, b) for a, b in zip(*grads))
