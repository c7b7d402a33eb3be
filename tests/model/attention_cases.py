"""Layouts and keys for tests of attention: packed rows and chunks, with and without entries and picks."""

from dataclasses import replace

import torch

from consilience.model.kernels.attention_keys import Keys
from consilience.model.layout import chunk_layout, packed_layout
from consilience.model.state import DecodeState
from consilience.model.top_k import top_k

SCALE = 0.4


def sample(length, count):
    """Segments and positions of `count` samples of about equal length, 2 of padding in the last."""
    owner = torch.arange(length) * count // length
    position = torch.arange(length) - (owner[:, None] > owner).sum(1)
    if count > 1:
        owner[-2:], position[-2:] = -1, 0
    return owner, position


def packed(config, length):
    """Rows of one sample, of three samples with padding behind, and of nothing but padding."""
    empty = torch.full((length,), -1), torch.zeros(length, dtype=torch.long)
    rows = [sample(length, 1), sample(length, 3), empty]
    segment, position = (torch.stack(part) for part in zip(*rows))
    return packed_layout(config, segment, position, None)


def continued(config, starts, length, lengths=None, lookahead=0):
    state = DecodeState.allocate(config, len(starts), 100, lookahead=lookahead)
    state.position[:] = torch.tensor(starts)
    return chunk_layout(config, state, length, None if lengths is None else torch.tensor(lengths), None)


def picked(windows, count, g):
    """`count` of the visible columns of every query, at random, ascending, -1 behind them."""
    column = torch.arange(windows.num_columns)
    seen = (column >= windows.first[..., None]) & (column < windows.stop[..., None])
    scores = torch.rand(seen.shape, generator=g).masked_fill(~seen, -1.0)
    best = top_k(scores, min(count, windows.num_columns))
    best = torch.where(seen.gather(2, best), best, windows.num_columns).sort(dim=-1).values
    padded = torch.full((*best.shape[:2], count), -1)
    padded[..., : best.shape[2]] = torch.where(best < windows.num_columns, best, -1)
    return padded


def case(layout, config, ratio=0, num_picks=None, heads=3, width=5, dtype=torch.float64, seed=0):
    """query, keys, sink, all of them leaves."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    rows, length = layout.position.shape
    keys = Keys(layout, config.sliding_window, draw(rows, layout.offset + length, width))
    if ratio:
        windows = layout.windows[ratio]
        picks = None if num_picks is None else picked(windows, num_picks, g)
        keys = replace(keys, entries=draw(rows, windows.num_columns, width), windows=windows, picks=picks)
    return draw(rows, length, heads, width), keys, draw(heads)


def leaves(query, keys, sink):
    return [query, sink, keys.window, *([] if keys.entries is None else [keys.entries])]
