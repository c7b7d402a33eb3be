"""The rows of a step are a function of the step, in whatever order steps are asked for."""

import numpy as np
import pytest

from consilience.conf.errors import ConfigError
from consilience.grpo.supervised_batches import Example, SupervisedBatches


def batches(**options):
    rng = np.random.default_rng(0)
    groups = [
        [Example(rng.integers(2, 40, n).tolist(), [1.0] * int(n)) for n in rng.integers(3, 30, num)]
        for num in (5, 8)
    ]
    return SupervisedBatches(groups, tokens_per_step=70, row_tokens=64, shares=(1.0, 2.0), **options)


def same(a, b):
    return np.array_equal(a.token_ids, b.token_ids) and np.array_equal(a.segment_ids, b.segment_ids)


def test_steps_can_be_asked_for_ahead_again_and_from_before_without_changing_any():
    straight = batches(seed=3)
    expected = [straight.at(step) for step in range(12)]
    assert not same(expected[0], expected[1])
    wandering = batches(seed=3)
    for step in (2, 0, 5, 3, 4, 11, 1, 10):
        assert same(wandering.at(step), expected[step])
    for step in range(12):
        wandering.forget(step)
        assert same(wandering.at(step), expected[step])
    assert same(wandering.at(4), expected[4])  # forgotten, drawn again from the start
    assert same(wandering.at(11), expected[11])
    assert not same(batches(seed=4).at(0), expected[0])


def test_what_is_forgotten_is_not_held():
    given = batches()
    given.at(9)
    given.forget(7)
    assert sorted(given._drawn) == [7, 8, 9]


def test_a_group_with_a_share_and_no_examples_is_refused():
    with pytest.raises(ConfigError, match="group 1 of 2 has no examples"):
        SupervisedBatches([[Example([1], [1.0])], []], tokens_per_step=8, row_tokens=32)
