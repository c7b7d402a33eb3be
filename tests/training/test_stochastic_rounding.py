"""Rounding by chance: to a neighbour, right on average, and the same again with the same key."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from consilience.training.stochastic_rounding import round_to_bf16, rounding_key

torch.set_num_threads(1)
STEP = 2.0**-7  # bf16 between 1 and 2


def test_a_quarter_of_the_way_goes_up_a_quarter_of_the_time():
    """65536 draws of p = 1/4: five standard deviations are 555."""
    found = round_to_bf16(torch.full((65536,), 1 + STEP / 4), rounding_key(0, 0, 0, "w"))
    assert set(found.float().tolist()) == {1.0, 1 + STEP}
    ups = int((found > 1).sum())
    assert abs(ups - 65536 / 4) < 5 * (65536 * 3 / 16) ** 0.5
    negative = round_to_bf16(torch.full((65536,), -1 - STEP / 4), rounding_key(0, 0, 0, "w"))
    assert torch.equal(negative, -found)


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1), st.integers())
def test_a_number_goes_to_one_of_its_two_neighbours_and_an_exact_one_stays(values, seed):
    values = torch.tensor(values)
    found = round_to_bf16(values, rounding_key(seed, 1, 2, "w"))
    toward_zero = (values.view(torch.int32) & -0x10000).view(torch.float32)
    away = ((values.view(torch.int32) & -0x10000) + 0x10000).view(torch.float32)
    is_exact = toward_zero == values
    assert torch.equal(found[is_exact].float(), values[is_exact])
    assert ((found.float() == toward_zero) | (found.float() == away)).all()


def test_what_is_not_a_number_or_infinite_stays_so():
    largest_nan = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    values = torch.cat([torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0]), largest_nan])
    found = round_to_bf16(values, 5)
    assert found[[0, 4, 5]].isnan().all() and found[1:4].tolist() == [float("inf"), -float("inf"), 0.0]


def test_the_mean_of_many_roundings_is_the_number():
    """Each of 300 numbers rounded in 4000 steps: mean error within five of its standard deviations."""
    values = torch.randn(300, generator=torch.Generator().manual_seed(0))
    total = sum(round_to_bf16(values, rounding_key(3, s, 0, "w")).double() for s in range(4000))
    low = (values.view(torch.int32) & -0x10000).view(torch.float32).double()
    high = ((values.view(torch.int32) & -0x10000) + 0x10000).view(torch.float32).double()
    deviation = ((values - low) * (high - values)).abs().sqrt() / 4000**0.5
    assert ((total / 4000 - values).abs() <= 5 * deviation + 1e-12).all()


def test_the_error_of_a_sum_grows_like_the_root_of_its_terms_where_nearest_rounding_keeps_its_bias():
    """64 ranks give 1 + step/4: to nearest 64 quarters are lost, by chance 64 · p(1 − p) is the variance."""
    values = torch.full((4096,), 1 + STEP / 4)
    by_chance = sum(round_to_bf16(values, rounding_key(0, 0, rank, "w")).float() for rank in range(64))
    exact = 64 * (1 + STEP / 4)
    assert 64 * float(values[0].bfloat16()) - exact == -16 * STEP
    error = by_chance - exact
    assert abs(float(error.mean())) < 5 * (64 * 3 / 16 / 4096) ** 0.5 * STEP
    assert float(error.std()) == pytest.approx((64 * 3 / 16) ** 0.5 * STEP, rel=0.05)


def test_keys_differ_by_seed_step_rank_and_name_and_the_same_key_gives_the_same_bits():
    values = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    keys = [(0, 0, 0, "w"), (1, 0, 0, "w"), (0, 1, 0, "w"), (0, 0, 1, "w"), (0, 0, 0, "v"), (0, 11, 0, "w")]
    found = [round_to_bf16(values, rounding_key(*key)) for key in keys]
    assert len({tuple(f.float().tolist()) for f in found}) == len(keys)
    assert torch.equal(found[0], round_to_bf16(values.clone(), rounding_key(*keys[0])))


def test_windows_of_a_tensor_round_as_the_whole_does():
    values = torch.randn(8, 50, generator=torch.Generator().manual_seed(2))
    whole = round_to_bf16(values, 9).view(-1)
    flat = values.view(-1)
    cuts = [round_to_bf16(flat[i : i + 37], 9, i) for i in range(0, 400, 37)]
    assert torch.equal(torch.cat(cuts), whole)


def test_draws_at_neighbouring_positions_are_not_related():
    """Lag-1 correlation of 2**18 draws: five standard deviations are 5 / 512."""
    ups = (round_to_bf16(torch.full((2**18,), 1 + STEP / 2), 7) > 1).float() - 0.5
    for lag in (1, 2, 64, 4096):
        assert abs(float((ups[lag:] * ups[:-lag]).mean()) * 4) < 5 / 512
