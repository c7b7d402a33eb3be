"""A prefix taken from a decode state in pieces, and put together again elsewhere."""

from dataclasses import replace

import pytest
import torch
from state_rows import BLOCKS_OF_12, allocate, feed, random_ids

from consilience.conf.errors import EngineError
from consilience.model.exact import exact_mode
from consilience.model.prefix_state import block_of, recompute_window, rest_of, restore, window_reach

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model(smallest, rough_model):
    """Blocks hold 12 tokens, windows 5 (fp32: only exact mode gives the same bits)."""
    return rough_model(replace(smallest, **BLOCKS_OF_12), dtype=torch.float32).requires_grad_(False)


def blocks(state, row, length):
    return [block_of(state, row, n) for n in range(length // 12)]


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def goes_on_alike(model, a, row_a, b, row_b, tokens, length):
    for size in (1, 1, 9, 1, 5):
        part = tokens[length : length + size]
        assert torch.equal(feed(model, a, row_a, part), feed(model, b, row_b, part))
        length += size
    assert same(rest_of(a, row_a), rest_of(b, row_b))


def test_at_a_border_by_hand(model):
    state = allocate(model, 1)
    feed(model, state, 0, random_ids(12))
    assert {name: tuple(t.shape) for name, t in block_of(state, 0, 0).items()} == {
        "layers.1.entries.0": (3, 16),
        "layers.1.entries.1": (3, 12),
        "layers.2.entries.0": (1, 16),
    }
    rest = {name: tuple(t.shape) for name, t in rest_of(state, 0).items()}
    window = model.config.sliding_window - 1
    assert [rest[f"layers.{n}.window"] for n in range(3)] == [(window, 16)] * 3
    # Four raw projections of the closed CSA window, their first half; nothing of HCA's.
    assert rest["layers.1.values.0.closed"] == rest["layers.1.gates.0.closed"] == (4, 16)
    assert rest["layers.1.values.0.open"] == (0, 32) and rest["layers.2.values.0.open"] == (0, 16)


@pytest.mark.parametrize("lookahead", [0, 1])
@pytest.mark.parametrize("length", [0, 1, 3, 5, 12, 23, 24, 37])
def test_a_prefix_comes_back_in_another_row_and_goes_on_bit_for_bit(length, lookahead, model):
    tokens, state = random_ids(60), allocate(model, 2)
    if length:
        feed(model, state, 1, tokens[:length])
    elsewhere = allocate(model, 3, num_blocks=9, lookahead=lookahead)
    elsewhere.reserve(2, 60)
    feed(model, elsewhere, 2, random_ids(31, seed=1))
    restore(elsewhere, 2, length, blocks(state, 1, length), rest_of(state, 1))
    assert int(elsewhere.position[2]) == length and elsewhere.capacity(2) == 60
    with exact_mode():
        goes_on_alike(model, state, 1, elsewhere, 2, tokens, length)


@pytest.mark.parametrize("most", [1, 7, 1000])
@pytest.mark.parametrize("length", [12, 24, 48])
def test_a_window_computed_again_is_the_one_that_was(length, most, model):
    tokens, state = random_ids(80), allocate(model, 1, 80)
    elsewhere = allocate(model, 2, 80)
    with exact_mode():
        feed(model, state, 0, tokens[:length])
        feed(model, elsewhere, 1, random_ids(45, seed=3))  # what other sequences left in the rings
        restore(elsewhere, 1, length, blocks(state, 0, length), None)
        count = recompute_window(model, elsewhere, 1, tokens[:length].tolist(), most)
        assert count == min(length, window_reach(model.config)) and int(elsewhere.position[1]) == length
        assert same(rest_of(state, 0), rest_of(elsewhere, 1))
        for n in range(length // 12):
            assert same(block_of(state, 0, n), block_of(elsewhere, 1, n))
        goes_on_alike(model, state, 0, elsewhere, 1, tokens, length)


def test_fewer_tokens_than_the_reach_do_not_give_the_window(model, monkeypatch):
    """The reach is needed: with a window less, the last layer's keys are others."""
    tokens, state, elsewhere = random_ids(48), allocate(model, 1), allocate(model, 1)
    short = window_reach(model.config) - model.config.sliding_window
    monkeypatch.setattr("consilience.model.prefix_state.window_reach", lambda config: short)
    with exact_mode():
        feed(model, state, 0, tokens)
        restore(elsewhere, 0, 48, blocks(state, 0, 48), None)
        recompute_window(model, elsewhere, 0, tokens.tolist(), 100)
    assert not same(rest_of(state, 0), rest_of(elsewhere, 0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b, r: b[1].pop("layers.1.entries.0"), "layers.1.entries.0 is missing"),
        (lambda b, r: b[0].update({"layers.2.entries.0": torch.zeros(2, 16)}), r"is torch.float32 \(2, 16\)"),
        (
            lambda b, r: r.update({"layers.0.window": r["layers.0.window"].double()}),
            "is torch.float64 .*, this model needs torch.float32",
        ),
        (lambda b, r: b.pop(), "1 blocks of 12 tokens are no 29 tokens"),
    ],
)
def test_pieces_that_do_not_fit_are_refused_by_name_and_the_row_is_empty(change, message, model):
    state, elsewhere = allocate(model, 1), allocate(model, 1)
    feed(model, state, 0, random_ids(29))
    pieces, rest = blocks(state, 0, 29), rest_of(state, 0)
    change(pieces, rest)
    with pytest.raises(EngineError, match=message):
        restore(elsewhere, 0, 29, pieces, rest)
    assert int(elsewhere.position[0]) == 0
