"""Which tokens and samples count, where some of an episode are left out."""

from dataclasses import replace

import numpy as np
import pytest

from consilience.grpo.mini_batch import known_mask, pack_records
from consilience.rollout.kept_sets import KeptSets
from consilience.rollout.records import FinishReason, Outcome, OutcomeKind, RolloutRecord, UserTurn

SET = np.array([1, 2])


def record(uid, count, sets=None):
    one = (1,) * count
    return RolloutRecord(
        uid, "g", "math", "chat", None, (3, 9), (2,) * count, (-0.5,) * count, one, one,
        FinishReason.STOP, Outcome(OutcomeKind.GRADED), 1.0, kept=None if sets is None else KeptSets.of(sets),
    )  # fmt: skip


def talk(uid, count, sets):
    """An episode of two streams: the first of 2 tokens that nobody knows the sets of, the last of `count`."""
    unknown = UserTurn((3,), (2, 2), (-0.5, -0.5), (1, 1), (0, 0), kept=KeptSets.of([None, None]))
    return replace(record(uid, count, sets), earlier=(unknown,), metadata={"resumed_at": 2})


def shares(packed):
    """Sample -> the share at each of its losses."""
    found = [packed.arrays["share"][packed.sample_index == s] for s in range(len(packed.lengths))]
    at = [packed.loss_mask[packed.sample_index == s] > 0 for s in range(len(packed.lengths))]
    return [share[where].tolist() for share, where in zip(found, at)]


def test_a_stream_has_the_share_of_its_tokens():
    whole = replace(record("a", 3), earlier=(UserTurn((3,), (2, 2), (-0.5, -0.5), (1, 1), (0, 0)),))
    assert shares(pack_records([whole], [1.0], 32)) == [pytest.approx([0.4] * 2), pytest.approx([0.6] * 3)]


def test_tokens_that_are_left_out_take_no_share_from_those_that_stay():
    """Of 2 + 4 tokens the 2 and one of the 4 are left out: the other three are the whole episode."""
    records = [talk("a", 4, [None, SET, SET, SET]), record("b", 2, [SET, SET])]
    assert shares(pack_records(records, [1.0, -1.0], 32, "episode", known_mask)) == [[], [1.0] * 3, [1.0] * 2]


def test_an_episode_whose_tokens_are_all_left_out_has_no_loss():
    records = [talk("a", 2, [None, None]), record("b", 1, [SET])]
    packed = pack_records(records, [1.0, -1.0], 32, "episode", known_mask)
    assert shares(packed) == [[], [], [1.0]] and packed.num_loss_tokens == 1
