"""Group advantages: a worked example, invariants, and what leaves the mean and the divisor."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from consilience.conf.errors import ConsilienceError
from consilience.grpo.advantage import group_advantages


def test_the_example_of_the_docstring():
    found = group_advantages([1, 0, None, 1, 1], list("aaabb"))
    assert found.advantage.tolist() == [0.5, -0.5, 0, 0, 0]
    assert found.is_kept.tolist() == [True, True, False, False, False]
    assert found.is_masked.tolist() == [False, False, True, False, False]
    assert (found.num_groups, found.num_without_signal, found.num_without_score) == (2, 1, 0)
    assert (found.num_kept, found.num_masked) == (2, 1)


def test_nothing_is_divided_by_the_standard_deviation():
    small, large = (group_advantages([0, scale], "gg").advantage for scale in (1, 10))
    assert large.tolist() == (10 * small).tolist() == [-5.0, 5.0]


def test_groups_may_interleave_and_keep_their_own_means():
    found = group_advantages([1, 10, 3, 30], [7, 8, 7, 8])
    assert found.advantage.tolist() == [-1, -10, 1, 10]


def test_a_masked_sample_changes_nothing_for_its_group():
    alone = group_advantages([1.0, 0.0, 0.25], "ggg")
    beside = group_advantages([1.0, None, 0.0, 0.25, None], "ggggg")
    assert beside.advantage[[0, 2, 3]].tolist() == alone.advantage.tolist()
    assert beside.num_kept == alone.num_kept == 3


def test_a_group_of_one_scored_sample_has_no_signal_and_a_masked_group_no_score():
    found = group_advantages([1.0, None, None, None], "aabb")
    assert found.num_without_signal == 1 and found.num_without_score == 1 and found.num_kept == 0


def test_rewards_equal_but_for_rounding_have_no_signal():
    assert group_advantages([0.1 + 0.2, 0.3], "gg").num_without_signal == 1
    assert group_advantages([0.3, 0.3001], "gg").num_kept == 2


def test_no_samples_give_empty_arrays():
    found = group_advantages([], [])
    assert found.advantage.shape == (0,) and found.num_groups == found.num_kept == 0


reward = st.one_of(st.none(), st.integers(-8, 8).map(lambda x: x / 4))


@given(st.lists(st.tuples(reward, st.integers(0, 3)), max_size=24), st.integers(-100, 100))
def test_shifting_all_rewards_leaves_advantages_which_sum_to_zero_in_each_group(samples, shift):
    rewards, groups = [r for r, _ in samples], [g for _, g in samples]
    found = group_advantages(rewards, groups)
    shifted = group_advantages([None if r is None else r + shift for r in rewards], groups)
    np.testing.assert_allclose(shifted.advantage, found.advantage, atol=1e-11)
    assert (shifted.is_kept == found.is_kept).all()
    for group in set(groups):
        assert abs(found.advantage[[g == group for g in groups]].sum()) < 1e-12


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_reward_that_is_not_finite_is_refused(bad):
    with pytest.raises(ConsilienceError, match="reward of sample 1 is"):
        group_advantages([1.0, bad], "gg")


def test_a_missing_group_is_refused():
    with pytest.raises(ValueError, match="2 rewards for 1 groups"):
        group_advantages([1.0, 2.0], ["g"])
