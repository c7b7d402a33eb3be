"""A lost environment takes its whole group out of training, and nothing else decides what goes."""

import itertools
import logging
from dataclasses import replace

import pytest

from consilience.rollout.drops import drop_groups, drop_report
from consilience.rollout.records import FinishReason, Outcome, OutcomeKind, RolloutRecord


def record(uid, kind=OutcomeKind.GRADED, *, length=2, reward=1.0):
    scored = kind is OutcomeKind.GRADED
    return RolloutRecord(
        uid, uid.rsplit("/", 1)[0], "agent", "chat", None, (1,), (5,) * length, (-0.5,) * length,
        (1,) * length, (0,) * length, FinishReason.STOP if scored else FinishReason.ABORT,
        Outcome(kind, "" if scored else "box b7 is gone"), reward if scored else None,
    )  # fmt: skip


PHASE = [
    record("0/0"),
    record("1/0"),
    record("0/1", OutcomeKind.LOST, length=9),
    record("1/1", OutcomeKind.FAILED),
    record("2/0", OutcomeKind.UNKNOWN),
    record("2/1", OutcomeKind.LOST),
]


def test_a_group_goes_as_a_whole_and_samples_masked_for_other_reasons_stay():
    kept, dropped = drop_groups(PHASE)
    assert [r.uid for r in kept] == ["1/0", "1/1"]
    assert {tuple(r.uid for r in group) for group in dropped.values()} == {("0/0", "0/1"), ("2/0", "2/1")}
    assert list(dropped) == ["0/1: lost: box b7 is gone", "2/0: unknown: box b7 is gone"]


def test_what_is_dropped_does_not_depend_on_rewards_or_lengths_of_the_others():
    for rewards, length in itertools.product(itertools.product((0.0, 1.0), repeat=2), (1, 500)):
        a, b = rewards
        phase = [
            record("0/0", reward=a, length=length),
            record("0/1", OutcomeKind.LOST),
            record("1/0", reward=b),
        ]
        assert [r.uid for r in drop_groups(phase)[0]] == ["1/0"]


def test_the_report_counts_what_went_and_shows_its_length(caplog):
    with caplog.at_level(logging.WARNING):
        report = drop_report(3, drop_groups(PHASE)[1])
    assert report == {
        "dropped_groups": 2.0,
        "dropped_samples": 4.0,
        "lost_environments": 2.0,
        "unknown_calls": 1.0,
        "dropped_length": (2 + 9 + 2 + 2) / 4,
    }
    assert "step 3: group 0 of 2 samples dropped: 0/1: lost: box b7 is gone" in caplog.text
    calm = drop_report(0, drop_groups([replace(PHASE[0])])[1])
    assert set(calm.values()) == {0.0} and "dropped_length" not in calm


@pytest.mark.parametrize("kind", [OutcomeKind.INFRA, OutcomeKind.FAILED, OutcomeKind.TAMPER])
def test_other_outcomes_drop_nothing(kind):
    phase = [record("0/0"), record("0/1", kind)]
    assert drop_groups(phase) == (phase, {})
