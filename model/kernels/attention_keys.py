"""Which keys the queries of a forward see, and the stretches of queries that attention works on at once.

B rows, T queries, C head width, W window, S window keys (offset + T), M entries, K picks of a query.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from consilience.model.layout import Layout, Windows

BUFFER = 1 << 20  # logits a stretch may hold; 4 MiB in fp32
GATHER_ABOVE = 8  # entries a pick, beyond which picked entries are gathered instead of masked ones skipped


@dataclass(frozen=True)
class Keys:
    """What the queries of one forward may attend to.

    window [B, S, C]    with `layout.offset` and `layout.oldest` saying who sees what
    entries [B, M, C]   compressed entries, or None; `windows` says who sees what
    picks [B, T, K]     columns the indexer chose of those (-1: none), or None for all visible ones
    """

    layout: Layout
    size: int  # W
    window: Tensor | None
    entries: Tensor | None = None
    windows: Windows | None = None
    picks: Tensor | None = None

    @property
    def gathers(self) -> bool:
        """Whether picked entries are gathered query by query; else every entry is scored and masked."""
        return self.picks is not None and self.windows.num_columns > GATHER_ABOVE * self.picks.shape[2]  # type: ignore[union-attr]

    def without_tensors(self) -> Keys:
        """What says where keys stand, without the keys."""
        return replace(self, window=None, entries=None, picks=None)

    def detached(self) -> Keys:
        """The same keys, which get no gradient."""
        window, entries = (None if x is None else x.detach() for x in (self.window, self.entries))
        return replace(self, window=window, entries=entries)

    def of_queries(
        self, start: int, stop: int, window: Tensor, entries: Tensor | None, picks: Tensor | None
    ) -> Keys:
        """The keys of queries start … stop - 1 alone: picks [B, n, K] are theirs, the others those of all.

        Window keys that none of them sees are left out.
        """
        layout, windows, here = self.layout, self.windows, slice(start, stop)
        if stop - start == layout.position.shape[1]:
            return replace(self, window=window, entries=entries, picks=picks)
        first, last = max(0, layout.offset + start - self.size), layout.offset + stop
        if windows is not None:
            windows = replace(
                windows,
                first=windows.first[:, here],
                stop=windows.stop[:, here],
                earlier=windows.earlier + start,
            )
        layout = replace(
            layout,
            position=layout.position[:, here],
            is_valid=layout.is_valid[:, here],
            oldest=layout.oldest[:, here] - first,
            offset=layout.offset + start - first,
        )
        return Keys(layout, self.size, window[:, first:last], entries, windows, picks)


@dataclass(frozen=True)
class Stretch:
    """Queries start … stop - 1 as `blocks` blocks of equal length; each sees `span` window keys of its own,
    the first block's from `key` on. `columns` entries are scored (or K gathered)."""

    start: int
    stop: int
    blocks: int
    key: int
    span: int
    columns: int


def stretches(keys: Keys, num_queries: int, rows: int, heads: int, buffer: int = BUFFER) -> Iterator[Stretch]:
    """Cut T queries: blocks of W, as many at once as the buffer allows, and what is left at the end."""
    size, offset, start = keys.size, keys.layout.offset, 0
    gathered = keys.entries.shape[2] * keys.picks.shape[2] if keys.gathers else 0  # type: ignore[union-attr]
    while start < num_queries:
        length = min(size, num_queries - start)
        key = max(offset + start - size, 0)
        span = offset + start + length - key
        blocks = 1
        if length == size and span == 2 * size:
            per_query = rows * (heads * (span + num_columns_of(keys, num_queries) + 1) + gathered)
            blocks = max(1, min((num_queries - start) // size, buffer // (per_query * size)))
        stop = start + blocks * length
        yield Stretch(start, stop, blocks, key, span, num_columns_of(keys, stop))
        start = stop


def num_columns_of(keys: Keys, token: int) -> int:
    """Entries scored, or gathered, for queries before `token`."""
    if keys.windows is None:
        return 0
    return keys.picks.shape[2] if keys.gathers else keys.windows.columns_before(token)  # type: ignore[union-attr]


def window_keys(keys: Keys, part: Stretch) -> Tensor:
    """[B · blocks, span, C]: the window keys of each block."""
    assert keys.window is not None
    if part.blocks == 1:
        return keys.window[:, part.key : part.key + part.span]
    stride = part.span // 2
    chosen = keys.window[:, part.key : part.key + (part.blocks + 1) * stride]
    return chosen.unfold(1, part.span, stride).transpose(2, 3).flatten(0, 1)


def visible(keys: Keys, part: Stretch) -> Tensor:
    """bool [B, n, span + columns]: which of the stretch's keys each of its n queries sees."""
    layout, here = keys.layout, slice(part.start, part.stop)
    device, length = layout.oldest.device, (part.stop - part.start) // part.blocks
    query = torch.arange(part.start, part.stop, device=device)
    first_key = part.key + (query - part.start) // length * (part.span // 2 if part.blocks > 1 else 0)
    slot = torch.arange(part.span, device=device) + first_key[:, None]
    near = (slot >= layout.oldest[:, here, None]) & (slot <= (layout.offset + query)[:, None])
    if not part.columns:
        return near
    if keys.gathers:
        return torch.cat((near, keys.picks[:, here] >= 0), dim=-1)  # type: ignore[index]
    return torch.cat((near, visible_columns(keys, part)), dim=-1)


def visible_columns(keys: Keys, part: Stretch) -> Tensor:
    """bool [B, n, columns] over the first `columns` entries: in range, and picked where picks are given."""
    windows, here = keys.windows, slice(part.start, part.stop)
    assert windows is not None
    column = torch.arange(part.columns, device=windows.stop.device)
    seen = (column >= windows.first[:, here, None]) & (column < windows.stop[:, here, None])
    if keys.picks is None:
        return seen
    picked = torch.zeros(*seen.shape[:2], part.columns + 1, dtype=torch.bool, device=seen.device)
    picks = keys.picks[:, here]
    # Column `columns` takes the places without a pick.
    picked.scatter_(2, torch.where(picks < 0, part.columns, picks), True)
    return picked[..., :-1]
