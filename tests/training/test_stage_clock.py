"""The clock: every second is in exactly one phase, also across a resume."""

import pytest

from consilience.training.stage_clock import StageClock


class Time:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_phases_sum_to_the_wall_time_and_nested_ones_are_not_counted_twice():
    time = Time()
    clock = StageClock(now=time)
    time.now += 1
    with clock.phase("rollout") as outer:
        time.now += 4
        with clock.phase("publish") as inner:
            time.now += 2
        time.now += 1
    with clock.phase("train"):
        time.now += 2
    assert (outer.seconds, inner.seconds) == (5, 2)
    report = clock.report()
    assert report["phases"] == {"other": 1, "rollout": 5, "publish": 2, "train": 2}
    assert report["wall_s"] == 10 and report["share"]["rollout"] == 0.5
    assert sum(report["share"].values()) == pytest.approx(1)


def test_tokens_are_divided_by_their_own_phase_or_by_the_wall_time():
    time = Time()
    clock = StageClock(now=time)
    with clock.phase("rollout"):
        time.now += 4
    time.now += 4
    clock.add_tokens("sampled", 100)
    clock.add_tokens("sampled", 100)
    clock.add_tokens("train", 80)
    report = clock.report({"sampled": "rollout", "train": "never opened"})
    assert report["tokens"] == {"sampled": 200, "train": 80}
    assert report["tokens_per_s"] == {"sampled": 50, "train": 10}


def test_a_resumed_stage_keeps_the_seconds_of_earlier_attempts():
    time = Time()
    first = StageClock(now=time)
    with first.phase("train"):
        time.now += 3
    first.add_tokens("train", 30)
    state = first.state()
    time.now += 1000  # not running
    second = StageClock(earlier=state, now=time)
    with second.phase("train"):
        time.now += 2
    second.add_tokens("train", 20)
    assert second.report()["phases"]["train"] == 5 and second.report()["tokens"] == {"train": 50}
    assert second.report()["wall_s"] == 5


def test_a_phase_that_fails_still_counts():
    time = Time()
    clock = StageClock(now=time)
    with pytest.raises(KeyboardInterrupt), clock.phase("rollout"):
        time.now += 3
        raise KeyboardInterrupt
    time.now += 1
    assert clock.report()["phases"] == {"other": 1, "rollout": 3}


def test_a_clock_that_measured_nothing_divides_by_nothing():
    report = StageClock(now=Time()).report()
    assert report["wall_s"] == 0 and report["tokens_per_s"] == {}


def test_who_watches_is_told_which_phase_counts_from_now_on():
    told = []
    clock = StageClock(on_phase=told.append)
    with clock.phase("train"), clock.phase("publish"):
        pass
    assert told == ["train", "publish", "train", "other"]
