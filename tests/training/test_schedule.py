"""The learning-rate factor at the steps where its parts meet."""

import math

import pytest

from consilience.conf.errors import ConfigError
from consilience.training.schedule import warmup_constant_cosine


def scales(num_steps, **kwargs):
    return [warmup_constant_cosine(step, num_steps=num_steps, **kwargs) for step in range(num_steps)]


def test_ramp_plateau_and_tail_by_hand():
    assert scales(8, warmup_steps=2, decay_steps=2, final_scale=0.1) == pytest.approx(
        [0.5, 1, 1, 1, 1, 1, 0.55, 0.1]
    )


def test_without_warmup_and_tail_the_factor_is_one():
    assert scales(5) == [1.0] * 5


def test_the_tail_is_half_a_cosine_and_stays_at_its_end():
    tail = scales(100, decay_steps=50, final_scale=0.0)[50:]
    assert tail == pytest.approx([0.5 * (1 + math.cos(math.pi * (i + 1) / 50)) for i in range(50)])
    assert warmup_constant_cosine(1000, num_steps=100, decay_steps=50, final_scale=0.2) == pytest.approx(0.2)


def test_a_schedule_of_warmup_and_tail_only_is_allowed():
    assert scales(4, warmup_steps=2, decay_steps=2, final_scale=0.0) == pytest.approx([0.5, 1, 0.5, 0])


@pytest.mark.parametrize(
    "kwargs",
    [
        {"num_steps": 4, "warmup_steps": 3, "decay_steps": 2},
        {"num_steps": 0},
        {"num_steps": 4, "warmup_steps": -1},
        {"num_steps": 4, "final_scale": 1.5},
    ],
)
def test_parts_that_do_not_fit_are_refused(kwargs):
    with pytest.raises(ConfigError, match="schedule"):
        warmup_constant_cosine(0, **kwargs)
