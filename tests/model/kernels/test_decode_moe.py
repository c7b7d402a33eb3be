"""The compiled mixture of experts of few rows against its PyTorch twin."""

from dataclasses import replace

import pytest
import torch

from consilience.model.config import TINY
from consilience.model.exact import exact_mode
from consilience.model.initialize import initialize
from consilience.model.kernels.compiled import library
from consilience.model.kernels.decode_moe import MOST_ROWS, decode_moe, is_available
from consilience.model.transformer import Transformer

torch.set_num_threads(1)

ODD = replace(
    TINY,
    vocab_size=17,
    hidden_size=37,
    n_routed_experts=7,
    num_experts_per_tok=3,
    moe_intermediate_size=21,
    n_shared_experts=1,
    routed_scaling_factor=1.7,
)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layers(config, seed=0):
    """A hash-routed and a learned layer with biases that matter and values beyond the clamp."""
    model = initialize(Transformer(config), seed).requires_grad_(False)
    hashed, learned = model.layers[0].ffn, model.layers[1].ffn
    for moe in (hashed, learned):
        for weight in (moe.experts.w1, moe.experts.w3, moe.shared_experts.w1.weight):
            weight.mul_(30)
        moe.gate.weight.mul_(20)
    learned.gate.bias.copy_(0.3 * draw(config.n_routed_experts, seed=seed + 1))
    return hashed, learned


def twin(moe, hidden, ids):
    weights, experts, _ = moe.gate(hidden, ids)
    return moe.experts(hidden, weights, experts)[0] + moe.shared_experts(hidden)


def test_this_machine_runs_the_compiled_kernel_where_no_gradient_is_wanted():
    assert not isinstance(library("decode_moe"), str), library("decode_moe")
    x, weight = draw(2, 3), draw(4, 3)
    assert not is_available(x, weight)
    with torch.no_grad():
        assert is_available(x, weight) and not is_available(x.double(), weight)
        assert not is_available(draw(MOST_ROWS + 1, 3), weight)
        with exact_mode():
            assert not is_available(x, weight)


@torch.no_grad()
def test_a_row_worked_by_hand():
    """D = I = 1, all weights 1: an expert of 1 gives silu(1) · 1, the chosen share the scaling factor."""
    moe = layers(replace(ODD, hidden_size=64, moe_intermediate_size=16, num_experts_per_tok=2))[1]
    for p in moe.parameters():
        p.zero_()
    for e in moe.experts.w1, moe.experts.w3, moe.experts.w2:
        e[:, 0, 0] = 1
    x = torch.zeros(1, 64)
    x[0, 0] = 1
    silu = 1 / (1 + torch.exp(torch.tensor(-1.0)))
    found = decode_moe(moe, x, torch.tensor([0]))
    torch.testing.assert_close(found[0, 0], 1.7 * silu)
    assert not found[0, 1:].any()


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 31, 64])
@pytest.mark.parametrize("is_odd", [True, False])
@pytest.mark.parametrize("kind", [0, 1])
def test_output_equals_the_twin(rows, is_odd, kind):
    config = ODD if is_odd else TINY
    moe = layers(config)[kind]
    x, ids = draw(rows, config.hidden_size), torch.arange(rows) % config.vocab_size
    found, wanted = decode_moe(moe, x, ids), twin(moe, x, ids)
    # Sums of up to 64 fp32 terms; the clamp is met, so single values reach limit² times a weight.
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
    assert torch.equal(found, decode_moe(moe, x, ids))
    assert torch.equal(moe(x, ids), found)


@torch.no_grad()
def test_of_equal_scores_the_lowest_expert_is_taken():
    moe = layers(ODD)[1]
    moe.gate.weight.zero_()
    moe.gate.bias.zero_()
    moe.gate.bias[2] = -1.0
    x, ids = draw(3, 37), torch.zeros(3, dtype=torch.long)
    only = moe.experts(x, torch.full((3, 3), 1.7 / 3), torch.tensor([[0, 1, 3]] * 3))[0]
    torch.testing.assert_close(decode_moe(moe, x, ids), only + moe.shared_experts(x), rtol=1e-4, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("kind", [0, 1])
def test_a_value_that_is_not_finite_stays_in_its_row(kind):
    moe, x, ids = layers(ODD)[kind], draw(4, 37), torch.arange(4)
    x[1, 3] = float("nan")
    found = decode_moe(moe, x, ids)
    assert found[1].isnan().all() and found[[0, 2, 3]].isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("is_odd", [True, False])
@pytest.mark.parametrize("kind", [0, 1])
def test_a_row_has_the_same_bits_alone_and_in_any_company(kind, is_odd):
    config = ODD if is_odd else TINY
    moe = layers(config)[kind]
    x, ids = draw(MOST_ROWS, config.hidden_size), torch.arange(MOST_ROWS) % config.vocab_size
    alone = torch.cat([decode_moe(moe, x[r : r + 1], ids[r : r + 1]) for r in range(MOST_ROWS)])
    for rows in (2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 65, 127, 128):
        assert torch.equal(decode_moe(moe, x[:rows], ids[:rows]), alone[:rows])
