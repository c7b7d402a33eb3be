"""Frequencies of the specification, interleaving, the inverse, and what attention sees of positions."""

import math
from dataclasses import replace

import pytest
import torch

from consilience.model.config import FLASH, PRO
from consilience.model.rope import inverse_frequencies, rotate, rotations

torch.set_num_threads(1)


def test_the_compressed_table_has_the_published_values():
    f = inverse_frequencies(FLASH, is_compressed=True)
    published = {0: 1.0, 15: 3.6355e-3, 16: 2.2656e-3, 20: 2.9698e-4, 25: 5.3723e-6, 31: 5.6805e-7}
    for pair, value in published.items():
        assert f[pair].item() == pytest.approx(value, rel=2e-5), pair
    assert f.dtype == torch.float32 and f.shape == (32,)
    assert torch.equal(f, inverse_frequencies(PRO, is_compressed=True))


def test_sliding_layers_turn_by_theta_10000_without_scaling():
    f = inverse_frequencies(FLASH, is_compressed=False)
    exact = torch.tensor([10000 ** (-2 * i / 64) for i in range(32)], dtype=torch.float64)
    torch.testing.assert_close(f.double(), exact, rtol=3e-7, atol=0)


def test_yarn_keeps_fast_pairs_divides_slow_ones_by_16_and_blends_linearly_between():
    f = inverse_frequencies(FLASH, is_compressed=True).double()
    plain = torch.tensor([160000 ** (-2 * i / 64) for i in range(32)], dtype=torch.float64)
    share = torch.tensor([min(max((i - 15) / (25 - 15), 0), 1) for i in range(32)], dtype=torch.float64)
    torch.testing.assert_close(f, plain * (1 - share) + plain / 16 * share, rtol=1e-6, atol=0)


def test_the_blend_lies_where_pairs_turn_32_times_and_once_in_the_original_length():
    turns = lambda i: 65536 / (2 * math.pi) * 160000 ** (-2 * i / 64)
    assert turns(15) > 32 > turns(16) and turns(24) > 1 > turns(25)


def test_a_factor_of_1_is_no_scaling():
    f = inverse_frequencies(replace(FLASH, rope_factor=1.0), is_compressed=True)
    exact = torch.tensor([160000 ** (-2 * i / 64) for i in range(32)], dtype=torch.float64)
    torch.testing.assert_close(f.double(), exact, rtol=3e-7, atol=0)


def test_neighbouring_channels_at_the_end_form_the_pairs():
    x = torch.tensor([9.0, 9.0, 1.0, 0.0, 0.0, 1.0])
    quarter, half = math.pi / 2, math.pi
    rotation = torch.polar(torch.ones(2), torch.tensor([quarter, half]))
    # (1, 0) by a quarter turn is (0, 1); (0, 1) by a half turn is (0, -1); the first two stay.
    torch.testing.assert_close(rotate(x, rotation), torch.tensor([9.0, 9.0, 0.0, 1.0, 0.0, -1.0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_conjugate_undoes_a_rotation_and_the_type_stays(dtype):
    x = torch.randn(3, 5, 2, 20, dtype=torch.float64).to(dtype)
    turn = rotations(
        torch.arange(5), inverse_frequencies(replace(FLASH, qk_rope_head_dim=16), is_compressed=True)
    )
    there = rotate(x, turn[:, None])
    back = rotate(there, turn.conj()[:, None])
    assert there.dtype == back.dtype == dtype and torch.equal(there[..., :4], x[..., :4])
    # fp64 is bounded by the fp32 table's unit length, bf16 by two roundings of values below 4.
    torch.testing.assert_close(back, x, rtol=0, atol=0.04 if dtype == torch.bfloat16 else 2e-6)


def test_rotating_keys_by_their_position_and_outputs_back_leaves_the_distance():
    """Section 4.1: a key at s in the output of a query at t carries the rotation s - t alone."""
    f = inverse_frequencies(replace(FLASH, qk_rope_head_dim=8), is_compressed=False)
    at = lambda p: rotations(torch.tensor(p), f)
    key = torch.randn(12)
    seen = [rotate(rotate(key, at(s)), at(t).conj()) for s, t in ((3, 10), (103, 110))]
    torch.testing.assert_close(seen[0], seen[1], rtol=0, atol=2e-5)
    torch.testing.assert_close(seen[0], rotate(key, at(7).conj()), rtol=0, atol=1e-6)


def test_scores_depend_on_the_distance_only():
    f = inverse_frequencies(replace(FLASH, qk_rope_head_dim=8), is_compressed=True)
    at = lambda p: rotations(torch.tensor(p), f)
    q, k = torch.randn(2, 8)
    scores = [(rotate(q, at(t)) * rotate(k, at(t - 5))).sum() for t in (5, 17, 400)]
    torch.testing.assert_close(torch.stack(scores), scores[0].expand(3), rtol=0, atol=2e-4)


def test_angles_are_fp32_products_even_at_a_million_tokens():
    f = inverse_frequencies(FLASH, is_compressed=True)
    position = torch.tensor([999_983])
    angle = (position.float()[:, None] * f).double()
    found = rotations(position, f)
    torch.testing.assert_close(found.real.double(), angle.cos(), rtol=0, atol=2e-7)
    torch.testing.assert_close(found.imag.double(), angle.sin(), rtol=0, atol=2e-7)


def test_gradients_turn_back():
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    turn = rotations(torch.arange(3), torch.tensor([1.0, 0.1]))
    assert torch.autograd.gradcheck(lambda t: rotate(t, turn), (x,))
