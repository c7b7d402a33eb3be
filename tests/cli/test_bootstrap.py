"""Bootstrap intervals: by hand, by invariants, against the normal approximation."""

import math

import numpy as np
import pytest

from consilience.cli.bootstrap import gain, paired, retention, score


def test_a_score_is_the_mean_and_its_interval_contains_it():
    estimate = score([1, 0, 1, 1])
    assert estimate.value == 0.75
    assert estimate.ci95[0] <= 0.75 <= estimate.ci95[1]


def test_a_certain_score_has_no_width():
    assert score([1] * 9).ci95 == (1.0, 1.0)


def test_the_interval_of_a_share_matches_the_normal_approximation():
    correct = np.arange(512) % 4 == 0
    low, high = score(correct, num_resamples=20_000).ci95
    half = 1.96 * math.sqrt(0.25 * 0.75 / 512)
    # percentile grid of 512 problems is 1/512 wide, Monte-Carlo noise below that
    assert low == pytest.approx(0.25 - half, abs=2 / 512)
    assert high == pytest.approx(0.25 + half, abs=2 / 512)


def test_pairing_removes_what_both_models_share():
    rng = np.random.default_rng(0)
    before = rng.random(400) < 0.5
    after = before.copy()
    after[:20] = True
    estimate = gain(after, before)
    assert estimate.value == pytest.approx((~before[:20]).sum() / 400)
    unpaired_half_width = 1.96 * math.sqrt(2 * 0.25 / 400)
    assert estimate.ci95[1] - estimate.ci95[0] < unpaired_half_width
    assert estimate.ci95[0] > 0


def test_equal_models_gain_nothing():
    assert gain([1, 0, 1], [1, 0, 1]).ci95 == (0.0, 0.0)


def test_swapping_the_models_turns_the_gain_around():
    after, before = [1, 1, 0, 1, 0, 1], [0, 1, 0, 0, 1, 1]
    forward, backward = gain(after, before, seed=4), gain(before, after, seed=4)
    assert backward.value == -forward.value
    assert backward.ci95 == pytest.approx((-forward.ci95[1], -forward.ci95[0]))


def test_retention_by_hand():
    base, specialist, student = [0, 0, 0, 0, 1], [1, 1, 1, 1, 1], [1, 1, 1, 0, 1]
    assert retention(student, base, specialist).value == pytest.approx(3 / 4)


def test_a_student_equal_to_its_teacher_retains_everything():
    base, specialist = [0, 1, 0, 0] * 20, [1, 1, 0, 1] * 20
    estimate = retention(specialist, base, specialist)
    assert estimate.value == 1.0
    assert estimate.ci95 == (1.0, 1.0)


def test_retention_of_a_specialist_that_learned_nothing_is_not_a_number():
    assert math.isnan(retention([1, 1], [1, 0], [1, 0]).value)


def test_the_same_seed_gives_the_same_interval_and_another_seed_another():
    correct = np.random.default_rng(1).random(101)
    assert score(correct, seed=3) == score(correct, seed=3)
    assert score(correct, seed=3).ci95 != score(correct, seed=4).ci95


@pytest.mark.parametrize("arrays", [([1, 0], [1]), ([], []), ([1, float("nan")], [0, 1])])
def test_arrays_that_do_not_pair_are_refused(arrays):
    with pytest.raises(ValueError):
        gain(*arrays)


def test_problems_one_model_has_no_grade_for_are_left_out_everywhere():
    grades = {"base": {"a": 0.0, "b": 1.0, "c": 1.0}, "student": {"c": 0.0, "a": 1.0}}
    assert paired(grades) == {"base": [0.0, 1.0], "student": [1.0, 0.0]}
