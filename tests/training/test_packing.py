"""Packing: a row worked by hand, then invariants, then a naive first-fit and timing."""

import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consilience.conf.errors import ConfigError
from consilience.training.packing import (
    pack,
    pack_episodes,
    split_micro_batches,
    unpack_positions,
    unpack_targets,
)


def random_samples(lengths, seed=0):
    rng = np.random.default_rng(seed)
    tokens = [rng.integers(1, 500, n) for n in lengths]
    masks = [rng.integers(0, 2, n) for n in lengths]
    values = [rng.standard_normal(n).astype(np.float32) for n in lengths]
    return tokens, masks, values


def test_two_samples_in_one_row_by_hand():
    packed = pack(
        [[5, 6, 7], [8, 9]],
        [[0, 1, 1], [0, 1]],
        {"logprobs": [[math.nan, -0.5, -0.25], [math.nan, -2.0]]},
        quantum=8,
        max_row_tokens=8,
    )
    assert packed.token_ids.tolist() == [[5, 6, 7, 8, 9, 0, 0, 0]]
    assert packed.segment_ids.tolist() == [[0, 0, 0, 1, 1, -1, -1, -1]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 0, 0]]
    assert packed.target_ids.tolist() == [[6, 7, 0, 9, 0, 0, 0, 0]]
    assert packed.loss_mask.tolist() == [[1, 1, 0, 1, 0, 0, 0, 0]]
    assert packed.arrays["logprobs"].tolist() == [[-0.5, -0.25, 0, -2.0, 0, 0, 0, 0]]
    assert packed.sample_index.tolist() == [[0, 0, 0, 1, 1, -1, -1, -1]]
    assert (packed.num_tokens, packed.num_loss_tokens) == (5, 3)
    assert packed.token_ids.dtype == np.int64 and packed.segment_ids.dtype == np.int32


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 64), min_size=1, max_size=60), st.sampled_from([1, 8, 16]))
def test_every_token_lands_once_with_its_successor_as_target(lengths, quantum):
    tokens, masks, values = random_samples(lengths)
    packed = pack(tokens, masks, {"v": values}, quantum=quantum, max_row_tokens=96)
    num_rows, row_tokens = packed.token_ids.shape
    assert row_tokens % quantum == 0 and row_tokens <= 96
    assert packed.num_tokens == sum(lengths)
    for s, ids in enumerate(tokens):
        at = np.argwhere(packed.sample_index == s)
        row = at[0, 0]
        span = at[:, 1]
        assert (at[:, 0] == row).all() and np.array_equal(span, np.arange(span[0], span[0] + len(ids)))
        assert np.array_equal(packed.token_ids[row, span], ids)
        assert np.array_equal(packed.position_ids[row, span], np.arange(len(ids)))
        assert len(set(packed.segment_ids[row, span])) == 1
        assert np.array_equal(packed.target_ids[row, span][:-1], ids[1:])
        assert np.array_equal(packed.loss_mask[row, span], [*masks[s][1:], 0])
        assert np.array_equal(packed.arrays["v"][row, span][:-1], values[s][1:])
    for b in range(num_rows):
        segments = packed.segment_ids[b][packed.segment_ids[b] >= 0]
        assert sorted(set(segments)) == list(range(segments.max() + 1))
    padding = packed.segment_ids < 0
    assert not packed.loss_mask[padding].any() and not packed.token_ids[padding].any()


def test_unpacking_gives_back_what_was_packed():
    tokens, masks, values = random_samples([7, 30, 1, 12, 12, 55, 3])
    packed = pack(tokens, masks, {"v": values}, quantum=8, max_row_tokens=64)
    for ids, found in zip(tokens, unpack_positions(packed, packed.token_ids)):
        assert np.array_equal(ids, found)
    for given_values, found in zip(values, unpack_targets(packed, packed.arrays["v"])):
        assert math.isnan(found[0]) and np.array_equal(given_values[1:], found[1:])
    integers = unpack_targets(packed, packed.target_ids, missing=0)
    assert all(
        found.dtype == np.int64 and np.array_equal(found[1:], ids[1:]) for found, ids in zip(integers, tokens)
    )


def test_vector_values_unpack_too():
    packed = pack([[1, 2, 3], [4, 5]], quantum=1, max_row_tokens=5)
    hidden = np.arange(5 * 2, dtype=np.float32).reshape(1, 5, 2)
    first, second = unpack_positions(packed, hidden)
    assert np.array_equal(np.concatenate([first, second]), hidden[0])


def naive_first_fit(lengths, row_tokens):
    free, rows = [], {}
    for s in sorted(range(len(lengths)), key=lambda s: (-lengths[s], s)):
        row = next((r for r, f in enumerate(free) if f >= lengths[s]), None)
        if row is None:
            row = len(free)
            free.append(row_tokens)
        free[row] -= lengths[s]
        rows[s] = row
    return [rows[s] for s in range(len(lengths))]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=80))
def test_placement_equals_a_naive_first_fit_decreasing(lengths):
    packed = pack([np.ones(n, int) for n in lengths], quantum=1, max_row_tokens=50)
    assert packed.rows.tolist() == naive_first_fit(lengths, packed.token_ids.shape[1])


def test_rows_are_shortened_when_the_last_one_would_be_half_empty():
    packed = pack([np.ones(100, int)] * 12, quantum=20, max_row_tokens=1000)
    assert packed.token_ids.shape == (2, 600)


def test_packing_is_the_same_every_time():
    tokens, masks, values = random_samples(np.random.default_rng(3).integers(1, 90, 300))
    first = pack(tokens, masks, {"v": values}, max_row_tokens=256)
    again = pack(tokens, masks, {"v": values}, max_row_tokens=256)
    assert all(np.array_equal(getattr(first, k), getattr(again, k)) for k in ("token_ids", "rows", "starts"))


def test_micro_batches_stay_within_the_budget_and_cover_all_rows():
    tokens, masks, _ = random_samples(np.random.default_rng(1).integers(1, 60, 100))
    packed = pack(tokens, masks, quantum=16, max_row_tokens=128)
    parts = split_micro_batches(packed, 3 * packed.token_ids.shape[1])
    assert max(part.token_ids.size for part in parts) <= 3 * packed.token_ids.shape[1]
    assert np.array_equal(np.concatenate([part.token_ids for part in parts]), packed.token_ids)
    assert sum(part.num_loss_tokens for part in parts) == packed.num_loss_tokens
    joined = np.concatenate([part.token_ids for part in parts])
    assert all(np.array_equal(a, b) for a, b in zip(unpack_positions(packed, joined), tokens))


def test_fractional_weights_survive_and_the_first_token_has_no_predictor():
    packed = pack([[1, 2, 3]], [[1.0, 0.25, 0.5]], quantum=4, max_row_tokens=4)
    assert packed.loss_mask.tolist() == [[0.25, 0.5, 0, 0]]
    assert packed.loss_weight == 0.75


def test_a_sample_of_one_token_is_packed_without_a_target():
    packed = pack([[4], [5]], quantum=2, max_row_tokens=2)
    assert packed.token_ids.tolist() == [[4, 5]] and packed.num_loss_tokens == 0


def test_tensors_carry_the_same_values():
    tensors = pack([[1, 2], [3, 4]], arrays={"advantage": [[0, 1.5], [0, -1.5]]}, quantum=4).to_torch()
    assert tensors["token_ids"].tolist() == [[1, 2, 3, 4]]
    assert tensors["advantage"].tolist() == [[1.5, 0, -1.5, 0]]


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: pack([]), ValueError, "nothing to pack"),
        (lambda: pack([[1], []]), ValueError, "sample 1 has no tokens"),
        (lambda: pack([[1] * 9], quantum=4, max_row_tokens=8), ConfigError, "sample 0 has 9 tokens"),
        (lambda: pack([[1] * 8], quantum=5, max_row_tokens=8), ConfigError, "at most 5"),
        (lambda: pack([[1, 2]], [[1]]), ValueError, "sample 0 has 1 values for 2 tokens"),
        (lambda: pack([[1, 2]], [[1, -1]]), ValueError, "negative"),
        (lambda: pack([[1, 2]], arrays={"lp": [[0, math.nan]]}), ValueError, "lp: sample 0"),
        (lambda: pack([[1, 2]], arrays={"lp": []}), ValueError, "0 samples"),
        (lambda: pack([[1, 2]], arrays={"rows": [[0, 1]]}), ValueError, "choose others"),
        (lambda: split_micro_batches(pack([[1] * 60]), 63), ConfigError, "one row of 64"),
        (lambda: unpack_positions(pack([[1, 2]]), np.zeros((1, 3))), ValueError, "do not cover"),
    ],
)
def test_input_that_cannot_be_packed_says_which_sample_and_why(call, error, says):
    with pytest.raises(error, match=says):
        call()


def test_five_thousand_short_samples_pack_in_fifty_milliseconds():
    tokens, masks, values = random_samples(np.random.default_rng(2).integers(10, 120, 5000))
    best = min(
        _cpu_seconds(lambda: pack(tokens, masks, {"v": values}, max_row_tokens=1024)) for _ in range(15)
    )
    assert best < 0.05


def _cpu_seconds(call):
    start = time.process_time()
    call()
    return time.process_time() - start


def test_an_episode_is_learnt_behind_its_prompt_by_hand():
    packed = pack_episodes([[5, 6], [8]], [[7, 3], [9]], [[1, 0], [1]], 8, {"old": [[-0.5, math.nan], [-2]]})
    assert packed.token_ids.shape == (1, 32), "rows are whole multiples of 32"
    assert packed.token_ids[0, :6].tolist() == [5, 6, 7, 3, 8, 9]
    assert packed.loss_mask[0, :6].tolist() == [0, 1, 0, 0, 1, 0]
    assert packed.arrays["old"][0, :6].tolist() == [0, -0.5, 0, 0, -2, 0]
    assert pack_episodes([[5] * 40], [[7]], [[1]], 8).token_ids.shape == (1, 64)


def test_a_value_too_few_for_an_episode_is_refused():
    with pytest.raises(ValueError, match="old"):
        pack_episodes([[5, 6]], [[7, 3]], [[1, 1]], 8, {"old": [[-0.5]]})
