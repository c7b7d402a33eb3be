"""A spike is found by hand-worked borders; noise, trends and outliers in the window are not."""

import math
import random

import pytest

from consilience.training.spike_detector import LEAST_SPREAD, TO_SIGMA, SpikeDetector


def fed(detector, losses):
    return [i for i, loss in enumerate(losses) if detector.is_spike(loss)]


def test_the_border_is_median_plus_threshold_times_scaled_mad_worked_by_hand():
    # Median of 1 2 3 4 5 is 3, deviations 2 1 0 1 2 have median 1: the border is 3 + 2 · 1.4826.
    window = [4.0, 1.0, 5.0, 2.0, 3.0]
    border = 3 + 2 * TO_SIGMA
    assert not SpikeDetector(5, 2.0, window).is_spike(border)
    assert SpikeDetector(5, 2.0, window).is_spike(math.nextafter(border, math.inf))
    assert not SpikeDetector(5, 2.0, window).is_spike(-100.0)  # a loss that falls is no spike


def test_a_loss_that_hardly_moves_has_a_hundredth_of_itself_as_spread():
    flat = SpikeDetector(4, 6.0, [2.0] * 4)
    assert not flat.is_spike(2.0 + 6 * LEAST_SPREAD * 2.0)
    assert flat.is_spike(2.13)


def test_nothing_is_a_spike_before_the_window_is_full():
    assert fed(SpikeDetector(8, 6.0), [1.0] * 7 + [1e6] + [1.0] * 8 + [9.0]) == [16]


def test_a_loss_that_is_not_finite_is_a_spike_and_does_not_enter_the_window():
    detector = SpikeDetector(3, 6.0, [1.0, 1.0, 1.0])
    assert detector.is_spike(math.nan) and detector.is_spike(math.inf)
    assert list(detector.losses) == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("seed", range(5))
def test_noise_alone_never_fires_and_an_injected_spike_always_does(seed):
    """10,000 steps of a falling loss with normal noise of 5 %; chance beyond 6 sigma is 1e-9 a step."""
    rng = random.Random(seed)
    loss = [(1 + 6 * math.exp(-i / 500)) * (1 + 0.05 * rng.gauss(0, 1)) for i in range(10_000)]
    assert fed(SpikeDetector(64, 6.0), loss) == []
    places = sorted(rng.sample(range(64, 10_000), 40))
    for i in places:
        loss[i] *= 1.8  # 16 sigma
    assert fed(SpikeDetector(64, 6.0), loss) == places


def test_a_few_spikes_in_the_window_hide_no_further_one():
    detector = SpikeDetector(16, 6.0, [1.0, 1.01, 0.99, 1.02] * 4)
    assert all(detector.is_spike(3.0) for _ in range(6))


def test_what_it_has_seen_goes_through_plain_numbers():
    whole, cut = SpikeDetector(4, 3.0), SpikeDetector(4, 3.0)
    losses = [1.0, 1.1, 0.9, 1.05, 1.3, 0.95, 4.0]
    expected = fed(whole, losses)
    found = fed(cut, losses[:5])
    resumed = SpikeDetector(4, 3.0, list(cut.losses))
    assert expected == found + [5 + i for i in fed(resumed, losses[5:])]
