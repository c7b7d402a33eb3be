"""The compiled experts against their PyTorch twin: `MoE`'s routed and shared experts one by one."""

import pytest
import torch
from torch.testing import assert_close

from consilience.model.config import TINY
from consilience.model.exact import exact_mode
from consilience.model.kernels import experts as compiled
from consilience.model.kernels.compiled import library
from consilience.model.kernels.experts import ROWS, Expert, is_available, one_expert, routed_experts
from consilience.model.moe import MoE

torch.set_num_threads(1)


def _moe(dtype: torch.dtype, width: int = 24, inner: int = 20, experts: int = 4) -> MoE:
    settings = {"hidden_size": width, "moe_intermediate_size": inner, "n_routed_experts": experts}
    config = TINY.__class__(**{**vars(TINY), **settings, "n_shared_experts": 2})
    moe, generator = MoE(config, layer=1, dtype=None), torch.Generator().manual_seed(width)
    for parameter in moe.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.8
    return moe.to(dtype)


def _case(tokens: int, dtype: torch.dtype, width: int, experts: int) -> tuple[torch.Tensor, ...]:
    """hidden, shares, choices, upstream gradient; some experts get no token."""
    generator = torch.Generator().manual_seed(tokens)
    hidden, upstream = (torch.randn(tokens, width, generator=generator).to(dtype) for _ in range(2))
    shares = torch.rand(tokens, 2, generator=generator).to(dtype)
    used = max(2, experts - 1)
    choices = torch.rand(tokens, used, generator=generator).argsort(1)[:, :2]
    return hidden.requires_grad_(), shares.requires_grad_(), choices, upstream


def _output(moe: MoE, hidden, shares, choices) -> torch.Tensor:
    return moe.experts(hidden, shares, choices)[0] + moe.shared_experts(hidden)


def _run(moe: MoE, tokens: int, dtype: torch.dtype) -> list[torch.Tensor]:
    width, experts = moe.gate.weight.shape[1], moe.gate.weight.shape[0]
    hidden, shares, choices, upstream = _case(tokens, dtype, width, experts)
    output = _output(moe, hidden, shares, choices)
    weights = [*moe.experts.parameters(), *moe.shared_experts.parameters()]
    return [output.detach(), *torch.autograd.grad(output, (hidden, shares, *weights), upstream)]


def test_this_machine_runs_the_compiled_kernel():
    assert not isinstance(library("experts"), str), library("experts")
    x = torch.zeros(1)
    assert is_available(x) and not is_available(x, x.double())
    with exact_mode():
        assert not is_available(x)


def test_two_tokens_worked_by_hand():
    """Width 1, limit 1, every matrix 1: an expert of x is silu(min(x, 1)) · clamp(x, ±1)."""
    one = torch.ones(1, 1)
    x, shares = torch.tensor([[0.5], [3.0]]), torch.tensor([[2.0], [10.0]])
    routed = Expert(*(one.expand(2, 1, 1).contiguous() for _ in range(3)))
    found = routed_experts(x, shares, torch.tensor([[1], [0]]), 1.0, routed)
    half, unit = 0.5 * 0.5 / (1 + torch.exp(torch.tensor(-0.5))), 1 / (1 + torch.exp(torch.tensor(-1.0)))
    assert_close(found, torch.stack((2 * half, 10 * unit))[:, None])
    assert_close(one_expert(x, 1.0, Expert(one, one, one)), torch.stack((half, unit))[:, None])


@pytest.mark.parametrize("tokens", [1, 7, 64, ROWS + 3])
@pytest.mark.parametrize(("width", "inner", "experts"), [(24, 20, 4), (16, 16, 2), (5, 33, 7)])
def test_output_and_gradients_equal_the_twin_s_in_fp64(tokens, width, inner, experts):
    ours = _run(_moe(torch.float32, width, inner, experts), tokens, torch.float32)
    theirs = _run(_moe(torch.float64, width, inner, experts), tokens, torch.float64)
    for found, exact in zip(ours, theirs, strict=True):
        assert found.dtype == torch.float32 and exact.dtype == torch.float64
        # Sums of up to ROWS · 2 fp32 products, relative to the largest of the tensor.
        assert_close(found.double(), exact, rtol=1e-4, atol=3e-6 * float(exact.abs().max()))


def test_how_rows_are_cut_changes_nothing_but_the_weights_rounding(monkeypatch):
    moe = _moe(torch.float32)
    whole = _run(moe, 50, torch.float32)
    monkeypatch.setattr(compiled, "ROWS", 8)
    for found, expected in zip(_run(moe, 50, torch.float32), whole, strict=True):
        assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_a_second_run_is_equal_to_the_bit_and_frozen_weights_cost_the_rest_nothing():
    moe = _moe(torch.float32)
    first, second = (_run(moe, 40, torch.float32) for _ in range(2))
    assert all(map(torch.equal, first, second))
    moe.requires_grad_(False)
    hidden, shares, choices, upstream = _case(40, torch.float32, 24, 4)
    output = _output(moe, hidden, shares, choices)
    assert torch.equal(output, first[0])
    assert all(map(torch.equal, torch.autograd.grad(output, (hidden, shares), upstream), first[1:3]))
    with torch.no_grad():
        assert torch.equal(_output(moe, hidden, shares, choices), first[0])


def test_no_tokens_give_an_empty_output_and_zero_gradients():
    found = _run(_moe(torch.float32), 0, torch.float32)
    assert found[0].shape == (0, 24) and not any(grad.any() for grad in found[3:])


def test_nothing_of_the_experts_width_is_kept_for_the_backward():
    moe, kept = _moe(torch.float32, width=24, inner=64), []
    hidden, shares, choices, _ = _case(30, torch.float32, 24, 4)
    own = {p.data_ptr() for p in moe.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        _output(moe, hidden, shares, choices)
    assert kept and max(t.numel() for t in kept if t.data_ptr() not in own) == hidden.numel()


@pytest.mark.parametrize("tokens", [7, 2 * ROWS + 3])
def test_gates_that_were_kept_give_what_those_made_again_give(tokens, monkeypatch):
    moe = _moe(torch.float32)
    found = []
    for wide in (0, 1 << 30):
        monkeypatch.setattr(compiled, "WIDE", wide)
        hidden, shares, choices, upstream = _case(tokens, torch.float32, 24, 4)
        output = _output(moe, hidden, shares, choices)
        weights = [*moe.experts.parameters(), *moe.shared_experts.parameters()]
        grads = [torch.autograd.grad(output, (hidden, *weights), upstream, retain_graph=True) for _ in "ab"]
        assert all(torch.equal(x, y) for x, y in zip(*grads))  # what is kept is read, not used up
        found.append((output, *grads[0]))
    for x, y in zip(*found):
        # Made again it may be in other pieces, and a product's last bits depend on its number of rows.
        assert_close(x, y, rtol=1e-5, atol=1e-6 * float(y.detach().abs().max()))
