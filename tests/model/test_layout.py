"""What a query sees, and where windows lie, at their borders, packed and continued."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from consilience.model.layout import chunk_layout, packed_layout, ring_size
from consilience.model.state import DecodeState

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def config(smallest):
    return replace(smallest, sliding_window=4, compress_ratios=(0, 4, 6, 4))


def seen_positions(layout, row, token):
    """Window keys a query sees, relative to its own position."""
    return list(range(int(layout.oldest[row, token]) - layout.offset - token, 1))


def packed(config, *samples, padding=0):
    """One row of samples of the given lengths, then padding."""
    segment = [n for n, length in enumerate(samples) for _ in range(length)] + [-1] * padding
    position = [t for length in samples for t in range(length)] + [0] * padding
    return packed_layout(config, torch.tensor([segment]), torch.tensor([position]), None)


def continued(config, starts, num_tokens, lengths=None, lookahead=0):
    state = DecodeState.allocate(config, len(starts), 60, lookahead=lookahead)
    state.position[:] = torch.tensor(starts)
    lengths = None if lengths is None else torch.tensor(lengths)
    return chunk_layout(config, state, num_tokens, lengths, None)


def test_a_packed_query_sees_its_window_within_its_segment(config):
    layout = packed(config, 7, 4, padding=1)
    assert seen_positions(layout, 0, 0) == [0]
    assert seen_positions(layout, 0, 2) == [-2, -1, 0]
    assert seen_positions(layout, 0, 6) == [-3, -2, -1, 0]
    assert seen_positions(layout, 0, 7) == [0]  # the first token of sample 1
    assert seen_positions(layout, 0, 9) == [-2, -1, 0]
    assert seen_positions(layout, 0, 11) == [0]  # padding sees itself, so nothing is ever NaN
    assert layout.is_valid.tolist() == [[True] * 11 + [False]]
    assert layout.offset == 0 and not layout.is_step


def test_entries_of_a_packed_row_are_numbered_through_and_seen_by_their_own_sample(config):
    layout = packed(config, 9, 3, 5, padding=2)
    csa, hca = layout.windows[4], layout.windows[6]
    # Tokens 3 and 7 of sample 0 and 3 of sample 2 (token 15 of the row) close a CSA window.
    assert (csa.closing.column.tolist(), csa.closing.position.tolist(), csa.num_columns) == (
        [0, 1, 2],
        [0, 4, 0],
        3,
    )
    assert csa.closing.source.tolist()[1] == [*range(8)] and csa.closing.source.tolist()[2][4:] == [
        12,
        13,
        14,
        15,
    ]
    assert csa.closing.is_present.tolist() == [[False] * 4 + [True] * 4, [True] * 8, [False] * 4 + [True] * 4]
    assert (hca.closing.column.tolist(), hca.closing.source.tolist()) == ([0], [[0, 1, 2, 3, 4, 5]])
    seen = [list(range(a, b)) for a, b in zip(csa.first[0].tolist(), csa.stop[0].tolist())]
    assert seen == [[]] * 3 + [[0]] * 4 + [[0, 1]] * 2 + [[]] * 3 + [[]] * 3 + [[2]] * 2 + [[]] * 2
    assert [csa.columns_before(t) for t in (0, 3, 4, 7, 8, 12, 19)] == [0, 0, 1, 1, 2, 3, 3]


def test_without_a_closed_window_there_is_no_entry(config):
    windows = packed(config, 3, 2).windows[4]
    assert windows.num_columns == 0 and windows.closing.row.numel() == 0 and not windows.stop.any()


@pytest.mark.parametrize("lookahead", [0, 5])
@pytest.mark.parametrize("start", [0, 1, 3, 4, 9])
def test_a_chunk_sees_what_the_state_holds(start, lookahead, config):
    layout = continued(config, [start, 2], 4, None, lookahead)
    assert layout.position.tolist() == [list(range(start, start + 4)), [2, 3, 4, 5]]
    assert layout.offset == 4
    for t in range(4):
        assert seen_positions(layout, 0, t) == list(range(-min(start + t, 3), 1))


@pytest.mark.parametrize("position", [0, 2, 3, 4, 11, 13])
def test_a_single_token_sees_the_ring_slots_of_its_window(position, config):
    layout = continued(config, [position], 1)
    assert layout.is_step
    assert layout.ring_seen[0].nonzero()[:, 0].tolist() == list(range(min(position + 1, 4)))
    with_room = continued(config, [position], 1, None, lookahead=3)
    seen = {(position - back) % 7 for back in range(min(position + 1, 4))}
    assert set(with_room.ring_seen[0].nonzero()[:, 0].tolist()) == seen
    assert not continued(config, [position], 1, [1]).is_step


def test_windows_of_a_chunk_take_slots_from_the_ring_and_from_the_new_tokens(config):
    layout = continued(config, [10], 4)  # tokens 10 … 13
    csa, hca = layout.windows[4], layout.windows[6]
    # CSA: token 11 closes entry 2 = tokens 4 … 11; 4 … 9 lie in the ring of 8, 10 and 11 follow it.
    assert (csa.closing.column.tolist(), csa.closing.position.tolist()) == ([2], [8])
    assert csa.closing.source.tolist() == [[4, 5, 6, 7, 0, 1, 8, 9]] and csa.closing.is_present.all()
    # HCA of 6: token 11 closes entry 1 = tokens 6 … 11.
    assert (hca.closing.column.tolist(), hca.closing.position.tolist()) == ([1], [6])
    assert hca.closing.source.tolist() == [[0, 1, 2, 3, 6, 7]]
    assert csa.first.tolist() == [[0] * 4] and csa.stop.tolist() == [[2, 3, 3, 3]]
    # Two more places in each ring: 4 … 9 lie at 4 … 9 of 10; 6 … 9 at 6, 7, 0, 1 of 8.
    wide = continued(config, [10], 4, None, lookahead=2)
    assert wide.windows[4].closing.source.tolist() == [[4, 5, 6, 7, 8, 9, 10, 11]]
    assert wide.windows[6].closing.source.tolist() == [[6, 7, 0, 1, 8, 9]]


def test_the_second_row_s_slots_lie_behind_the_first_row_s(config):
    csa = continued(config, [2, 10], 2).windows[4]
    assert csa.closing.row.tolist() == [0, 1]
    assert csa.closing.source.tolist() == [[0, 0, 0, 0, 0, 1, 8, 9], [14, 15, 16, 17, 10, 11, 18, 19]]
    assert csa.closing.is_present.sum(1).tolist() == [4, 8]


def test_lengths_of_0_and_1_close_nothing_beyond_them(config):
    layout = continued(config, [3, 3, 2], 2, [1, 0, 2])
    closing = layout.windows[4].closing
    assert closing.row.tolist() == [0, 2] and closing.column.tolist() == [0, 0]
    assert layout.windows[4].num_columns == 1
    assert layout.is_valid.tolist() == [[True, False], [False, False], [True, True]]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(samples=st.lists(st.integers(1, 15), min_size=1, max_size=5), padding=st.integers(0, 7))
def test_columns_before_bounds_what_packed_queries_see(config, samples, padding):
    layout = packed(config, *samples, padding=padding)
    for windows in layout.windows.values():
        stop = windows.stop[0]
        for token in range(1, stop.numel() + 1):
            assert int(stop[:token].max()) <= windows.columns_before(token) <= windows.num_columns
        assert windows.num_columns == int(stop.max()) == sum(n // windows.ratio for n in samples)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(rows=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 9)), min_size=1, max_size=4))
def test_columns_before_bounds_what_the_queries_of_a_chunk_see(config, rows):
    starts, lengths = zip(*rows)
    layout = continued(config, starts, 9, list(lengths))
    for windows in layout.windows.values():
        for token in range(1, 10):
            bound = windows.columns_before(token)
            assert int(windows.stop[:, :token].max()) <= bound <= windows.num_columns
            assert bound <= (max(starts) + token) // windows.ratio
        assert windows.num_columns == max(s + n for s, n in rows) // windows.ratio


def test_ring_sizes():
    assert (ring_size(4), ring_size(128)) == (8, 128)
