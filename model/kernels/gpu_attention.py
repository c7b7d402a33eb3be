"""Attention's Triton kernels behind autograd: which way a call's entries are read; twin: sink_attention.py.

Picked entries are gathered query by query, or every entry is scored and those not picked are masked: with few
entries a pick, dense tiles cost less than rows gathered and gradient rows summed.

B rows, T queries, H heads, C head width, S window keys, M entries, K picks of a query.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from consilience.model.kernels.choice import uses_triton
from consilience.model.recompute import named

if TYPE_CHECKING:
    from consilience.model.kernels.sink_attention import Keys

NONE, RANGE, MASK, GATHER = range(4)  # which entries a query sees: none, its range, picks by mask, by list
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


def is_available(query: Tensor, keys: Keys, sink: Tensor) -> bool:
    """Whether the kernels serve this call: on a GPU, C a power of two from 16 to 512, one dtype for all."""
    if not uses_triton(query, keys.window, keys.entries, sink):
        return False
    dtypes = {x.dtype for x in (query, keys.window, keys.entries) if x is not None}
    width = query.shape[3]
    return len(dtypes) == 1 and 16 <= width <= 512 and width & (width - 1) == 0 and query.numel() > 0


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


def _forward(query: Tensor, keys: Keys, sink: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    from consilience.model.kernels import triton_attention

    return triton_attention.forward(problem_of(query, keys, sink, scale))  # pyright: ignore[reportArgumentType]


class _GpuAttention(torch.autograd.Function):
    """Saves the output and the softmax' denominators; the backward computes the logits anew."""

    @staticmethod
    def forward(ctx, query, window, entries, picks, sink, scale, place):  # type: ignore[override]
        # Tensors reach `ctx` through save_for_backward alone, where checkpointing can see them.
        keys = replace(place, window=window, entries=entries, picks=picks)
        output, denominator = named("attention_output", _forward, query, keys, sink, scale)
        ctx.save_for_backward(query, window, entries, picks, sink, output, denominator)
        ctx.scale, ctx.place = scale, place
        return output

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        from consilience.model.kernels import triton_attention_backward

        query, window, entries, picks, sink, output, denominator = ctx.saved_tensors
        keys = replace(ctx.place, window=window, entries=entries, picks=picks)
        problem = problem_of(query, keys, sink, ctx.scale)
        given = (problem, output, denominator, grad.contiguous())
        found = triton_attention_backward.backward(*given)  # pyright: ignore[reportArgumentType]
        return *found[:3], None, found[3], None, None


def sink_attention(query: Tensor, keys: Keys, sink: Tensor, scale: float) -> Tensor:
    """`sink_attention.sink_attention` of packed rows and chunks by the Triton kernels.

    bf16 (or fp16) products with fp32 accumulation; probabilities and dS are rounded to the query's dtype
    before the products that take them. Deterministic; memory is linear in T.
    """
    place = replace(keys, window=None, entries=None, picks=None)
    tensors = (query, keys.window, keys.entries, keys.picks, sink)
    return _GpuAttention.apply(*tensors, scale, place)  # type: ignore[return-value]
