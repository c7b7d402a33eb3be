"""Kept sets as bytes: two tokens by hand, turns put together, JSON there and back."""

import numpy as np
import pytest

from consilience.rollout.kept_sets import KeptSets, joined


def sets(*given):
    return KeptSets.of([None if one is None else np.array(one) for one in given])


def test_two_tokens_and_one_without_a_record_by_hand():
    found = sets([3, 129_279], None, [7])
    assert found.num_tokens == 3 and found.num_ids().tolist() == [2, 0, 1]
    assert found.token_ids().tolist() == [3, 129_279, 7]
    assert len(found.sizes) + len(found.ids) == 4 * (3 + 3)  # 4 (1 + size) bytes a token
    assert KeptSets.from_json(found.to_json()) == found


def test_turns_stand_where_they_were_sampled():
    whole = joined(6, [(0, sets([1], [2, 3])), (4, sets([4, 5, 6], [7]))])
    assert whole.num_ids().tolist() == [1, 2, 0, 0, 3, 1]
    assert whole.token_ids().tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert joined(6, []) is None


def test_sizes_that_do_not_add_up_are_refused():
    found = sets([1, 2], [3])
    with pytest.raises(ValueError, match="kept sets of 3 ids in all with 8 bytes"):
        KeptSets(found.sizes, found.ids[:8])
