"""What attention's Triton kernels read, and which way they read a call's entries.

Picked entries are gathered query by query, or every entry is scored and those not picked are masked: with few
entries a pick, dense tiles cost less than rows gathered and gradient rows summed.

B rows, T queries, H heads, C head width, S window keys, M entries, K picks of a query.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from consilience.model.kernels.attention_keys import Keys

NONE, RANGE, MASK, GATHER = range(4)  # which entries a query sees: none, its range, picks by mask, by list
HAND_PLACED = True  # whether Hopper's Gluon kernels take the calls that they can
MASK_BELOW: float | None = None  # entries a pick, up to which they are masked; None: as `_mask_below` says


@dataclass(frozen=True)
class Problem:
    """What all kernels of one attention read; every tensor contiguous.

    query [B, T, H, C]; window [B, S, C]; entries [B, M, C]; oldest, first, stop [B, T] int64
    chosen      None; picks [B, T, K] int64, -1 behind them; or a mask [B, T, M] uint8
    offset      window keys before the first query; size = W; scale of the logits
    """

    query: Tensor
    window: Tensor
    entries: Tensor | None
    chosen: Tensor | None
    oldest: Tensor
    first: Tensor | None
    stop: Tensor | None
    sink: Tensor
    scale: float
    offset: int
    size: int

    @property
    def num_entries(self) -> int:
        return 0 if self.entries is None else self.entries.shape[1]

    @property
    def mode(self) -> int:
        if not self.num_entries:
            return NONE
        if self.chosen is None:
            return RANGE
        return MASK if self.chosen.dtype == torch.uint8 else GATHER

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """query … sink as kernels take them; where there is none, a tensor that is not read."""
        rest = (self.entries, self.chosen, self.oldest, self.first, self.stop)
        return (self.query, self.window, *(self.oldest if x is None else x for x in rest), self.sink)

    @property
    def lengths(self) -> tuple[int, ...]:
        """T, S, M, K, H and the offset."""
        num_picks = 0 if self.chosen is None else self.chosen.shape[2]
        return (
            self.query.shape[1],
            self.window.shape[1],
            self.num_entries,
            num_picks,
            self.query.shape[2],
            self.offset,
        )


def _mask_below(num_heads: int) -> float:
    """Measured on an H100: a query's own keys pay early where 64 heads share them, late where 16 do."""
    return MASK_BELOW if MASK_BELOW is not None else 1.5 if num_heads > 32 else 4.0


def _chosen(keys: Keys, num_heads: int) -> Tensor | None:
    """The picks, or a mask of them where entries are few."""
    picks, windows = keys.picks, keys.windows
    if picks is None or windows is None or windows.num_columns > _mask_below(num_heads) * picks.shape[2]:
        return None if picks is None else picks.contiguous()
    rows, num_queries, _ = picks.shape
    columns = windows.num_columns
    mask = torch.zeros(rows, num_queries, columns + 1, dtype=torch.uint8, device=picks.device)
    # Column M takes the places without a pick.
    mask.scatter_(2, torch.where(picks < 0, columns, picks), 1)
    return mask[..., :columns].contiguous()


def problem_of(query: Tensor, keys: Keys, sink: Tensor, scale: float) -> Problem:
    """The kernels' arguments of a call of `sink_attention`."""
    assert keys.window is not None
    layout, windows = keys.layout, keys.windows
    has_entries = keys.entries is not None and windows is not None
    return Problem(
        query=query.contiguous(),
        window=keys.window.contiguous(),
        entries=keys.entries.contiguous() if has_entries else None,  # type: ignore[union-attr]
        chosen=_chosen(keys, query.shape[2]) if has_entries else None,
        oldest=layout.oldest.contiguous(),
        first=windows.first.contiguous() if has_entries else None,  # type: ignore[union-attr]
        stop=windows.stop.contiguous() if has_entries else None,  # type: ignore[union-attr]
        sink=sink.contiguous(),
        scale=scale,
        offset=layout.offset,
        size=keys.size,
    )
