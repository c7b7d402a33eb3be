"""Sink attention in exact mode: every query by itself, its keys in logical order, tile by tile.

An online softmax that starts from the sink: a tile of keys without a visible one changes nothing to the
last bit, so the number of tiles, which differs between a packed row and a decode step, does not matter.

n queries of a tile, H heads, C head width, S keys of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from consilience.model.exact import KEY_TILE, padded, tile_of

if TYPE_CHECKING:
    from consilience.model.kernels.attention_keys import Keys
    from consilience.model.layout import Windows


def exact_attention(query: Tensor, keys: Keys, sink: Tensor, scale: float) -> Tensor:
    """`sink_attention` without a gradient: query [B, T, H, C] -> [B, T, H, C]."""
    rows, num_tokens, heads, width = query.shape
    wide = torch.promote_types(query.dtype, torch.float32)
    row = padded(torch.arange(rows, device=query.device).repeat_interleave(num_tokens))
    token = padded(torch.arange(num_tokens, device=query.device).repeat(rows))
    flat = padded(query.reshape(-1, heads, width).to(wide) * scale)
    tiles = zip(*(x.split(tile_of(query)) for x in (row, token, flat)))
    found = torch.cat([_attend(q, keys, b, t, sink.to(wide)) for b, t, q in tiles])
    return found[: rows * num_tokens].view(query.shape).to(query.dtype)


def _attend(query: Tensor, keys: Keys, row: Tensor, token: Tensor, sink: Tensor) -> Tensor:
    """query [n, H, C] of tokens (row, token) [n]."""
    top = sink.expand(query.shape[0], -1)
    total, output = torch.ones_like(top), torch.zeros_like(query)
    for chosen, seen in _key_tiles(keys, row, token):
        chosen = chosen.to(query.dtype)
        logits = torch.bmm(query, chosen.transpose(1, 2)).masked_fill(~seen[:, None], float("-inf"))
        higher = torch.maximum(top, logits.amax(-1))
        weights, decay = torch.exp(logits - higher[..., None]), torch.exp(top - higher)
        total = total * decay + weights.sum(-1)
        output = output * decay[..., None] + torch.bmm(weights, chosen)
        top = higher
    return output / total[..., None]


def _key_tiles(keys: Keys, row: Tensor, token: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Keys [n, S, C] and which are seen [n, S]: the window oldest first, then the entries."""
    layout = keys.layout
    assert keys.window is not None
    back = torch.arange(keys.size - 1, -1, -1, device=row.device)
    if layout.is_step:
        slot = layout.position[row, token][:, None] - back
        seen, slot = slot >= 0, slot % keys.window.shape[1]
    else:
        slot = layout.offset + token[:, None] - back
        seen = slot >= layout.oldest[row, token][:, None]
    yield from _tiles(keys.window, row, slot, seen)
    if keys.entries is None or keys.windows is None or not keys.entries.shape[1]:
        return
    first, stop = keys.windows.first[row, token], keys.windows.stop[row, token]
    if keys.picks is None:
        column = first[:, None] + torch.arange(int((stop - first).max()), device=row.device)
        seen = column < stop[:, None]
    else:
        column = keys.picks[row, token]
        seen = column >= 0
    yield from _tiles(keys.entries, row, column, seen)


def _tiles(source: Tensor, row: Tensor, index: Tensor, seen: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """source [B, N, C] at index [n, any] of each row, KEY_TILE columns at a time."""
    missing = -index.shape[1] % KEY_TILE
    index = torch.nn.functional.pad(torch.where(seen, index, 0), (0, missing))
    seen = torch.nn.functional.pad(seen, (0, missing))
    flat = source.reshape(-1, source.shape[-1])
    for place, here in zip(index.split(KEY_TILE, dim=1), seen.split(KEY_TILE, dim=1)):
        if bool(here.any()):
            chosen = flat.index_select(0, (row[:, None] * source.shape[1] + place).flatten())
            yield chosen.view(*place.shape, -1), here


def exact_scores(query: Tensor, weight: Tensor, keys: Tensor, windows: Windows) -> Iterator[Tensor]:
    """Index scores Σ_h w_h · ReLU(q_h · K_i), -inf where not visible: [n, M] of n tokens after another.

    query [B, T, H, C], weight [B, T, H], keys [B, M, C]. The last n includes what fills the tile.
    """
    rows, num_tokens, heads, width = query.shape
    row = padded(torch.arange(rows, device=query.device).repeat_interleave(num_tokens))
    wide = torch.promote_types(query.dtype, torch.float32)
    flat, weights = (
        padded(query.reshape(-1, heads, width).to(wide)),
        padded(weight.reshape(-1, heads).to(wide)),
    )
    first, stop = padded(windows.first.flatten()), padded(windows.stop.flatten())
    tile = tile_of(query)
    for start in range(0, flat.shape[0], tile):
        here = slice(start, start + tile)
        column = first[here, None] + torch.arange(int((stop - first)[here].max()), device=keys.device)
        seen = column < stop[here, None]
        # What is not seen goes to a column of its own behind the others.
        behind = keys.shape[1]
        scores = flat.new_full((tile, behind + 1), float("-inf"))
        place = torch.nn.functional.pad(torch.where(seen, column, behind), (0, KEY_TILE), value=behind)
        for number, (chosen, _) in enumerate(_tiles(keys, row[here], column, seen)):
            match = torch.bmm(flat[here], chosen.to(wide).transpose(1, 2)).relu_() * weights[here, :, None]
            target = place[:, number * KEY_TILE : (number + 1) * KEY_TILE]
            scores.scatter_(1, target, match.sum(1)[:, : target.shape[1]])
        yield scores[:, :behind]
