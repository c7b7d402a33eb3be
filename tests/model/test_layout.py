"""Masks and windows at their borders, packed and continued."""

from dataclasses import replace

import pytest
import torch

from consilience.model.layout import as_bias, chunk_layout, packed_layout, ring_size
from consilience.model.rope import inverse_frequencies
from consilience.model.state import DecodeState

torch.set_num_threads(1)


@pytest.fixture
def config(smallest):
    return replace(smallest, sliding_window=4, compress_ratios=(0, 4, 6, 4))


def frequencies(config):
    return {c: inverse_frequencies(config, is_compressed=c) for c in (False, True)}


def seen_positions(layout, config, row, token):
    """Key slots of a query that its window bias lets through, relative to the query's own position."""
    columns = (layout.window_bias[row, token] == 0).nonzero()[:, 0]
    return (columns - config.sliding_window - token % layout.block).tolist()


def test_a_packed_query_sees_its_window_within_its_segment(config):
    segments = torch.tensor([[0] * 7 + [1] * 4 + [-1]])
    positions = torch.tensor([[*range(7), *range(4), 0]])
    layout = packed_layout(config, frequencies(config), segments, positions, None)
    assert seen_positions(layout, config, 0, 0) == [0]
    assert seen_positions(layout, config, 0, 6) == [-3, -2, -1, 0]
    assert seen_positions(layout, config, 0, 7) == [0]  # the first token of sample 1
    assert seen_positions(layout, config, 0, 9) == [-2, -1, 0]
    assert seen_positions(layout, config, 0, 11) == [0]  # padding sees itself, so nothing is ever NaN
    assert layout.is_valid.tolist() == [[True] * 11 + [False]]


@pytest.mark.parametrize("start", [0, 1, 3, 4, 9])
def test_a_chunk_sees_what_the_state_holds(start, config):
    state = DecodeState.allocate(config, 2, 40)
    state.position[:] = torch.tensor([start, 2])
    layout = chunk_layout(config, frequencies(config), state, 4, None, None)
    assert layout.position.tolist() == [list(range(start, start + 4)), [2, 3, 4, 5]]
    for t in range(4):
        assert seen_positions(layout, config, 0, t) == list(range(-min(start + t, 3), 1))


@pytest.mark.parametrize("position", [0, 2, 3, 4, 11])
def test_a_single_token_sees_the_ring_slots_that_were_filled(position, config):
    state = DecodeState.allocate(config, 1, 40)
    state.position.fill_(position)
    layout = chunk_layout(config, frequencies(config), state, 1, None, None)
    filled = (layout.window_bias[0, 0] == 0).nonzero()[:, 0].tolist()
    assert filled == list(range(min(position + 1, 4)))


def test_windows_of_a_chunk_take_slots_from_the_ring_and_from_the_new_tokens(config):
    state = DecodeState.allocate(config, 1, 40)
    state.position.fill_(10)
    layout = chunk_layout(config, frequencies(config), state, 4, None, None)  # tokens 10 … 13
    csa, hca = layout.windows[4], layout.windows[6]
    # CSA: token 11 closes entry 2 = tokens 4 … 11; 4 … 9 lie in the ring of 8, 10 and 11 follow it.
    assert (csa.column.tolist(), csa.position.tolist()) == ([2], [8])
    assert csa.source.tolist() == [[4, 5, 6, 7, 0, 1, 8, 9]] and csa.is_present.all()
    # HCA of 6: token 11 closes entry 1 = tokens 6 … 11.
    assert (hca.column.tolist(), hca.position.tolist()) == ([1], [6])
    assert hca.source.tolist() == [[0, 1, 2, 3, 6, 7]]
    assert (csa.bias[0] == 0).sum(1).tolist() == [2, 3, 3, 3]


def test_lengths_of_0_and_1_close_nothing_beyond_them(config):
    state = DecodeState.allocate(config, 3, 40)
    state.position[:] = torch.tensor([3, 3, 2])
    layout = chunk_layout(config, frequencies(config), state, 2, torch.tensor([1, 0, 2]), None)
    assert layout.windows[4].row.tolist() == [0, 2] and layout.windows[4].column.tolist() == [0, 0]
    assert layout.is_valid.tolist() == [[True, False], [False, False], [True, True]]


def test_ring_sizes_and_bias():
    assert (ring_size(4), ring_size(128)) == (8, 128)
    assert as_bias(torch.tensor([True, False])).tolist() == [0.0, float("-inf")]
