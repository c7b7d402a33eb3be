"""Attention of packed rows and chunks on a CPU, query by query (range_attention.c); twin: sink_attention.py.

A query sees two short ranges of keys. Batched products over blocks of queries compute more than is seen, and
pass over the logits once for the mask, the sink, the softmax and each factor; here those stay in cache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from consilience.model.kernels.compiled import call, library
from consilience.model.kernels.row_parts import even, fixed, in_parts, number

if TYPE_CHECKING:
    from consilience.model.kernels.attention_keys import Keys


def is_available(query: Tensor) -> bool:
    """Whether attention can go through the compiled kernel: fp32 on the CPU, and a compiler was found."""
    fits = query.device.type == "cpu" and query.dtype == torch.float32
    return fits and not isinstance(library("range_attention"), str)


def _arguments(query: Tensor, keys: Keys, sink: Tensor, scale: float) -> tuple[tuple, int, int]:
    """What both functions begin with; the most keys of a query; floats that picked keys take."""
    assert keys.window is not None
    layout, windows, picks = keys.layout, keys.windows, keys.picks
    num_picks = 0 if picks is None else picks.shape[2]
    num_entries = 0 if keys.entries is None else keys.entries.shape[1]
    entries = None if keys.entries is None else keys.entries.contiguous()
    most = keys.size + (num_picks or num_entries)
    numbers = (*query.shape[1:], keys.window.shape[1], num_entries, num_picks, layout.offset, most, scale)
    ranges = (None, None) if windows is None else (windows.first.contiguous(), windows.stop.contiguous())
    picks = None if picks is None else picks.contiguous()
    given = (query, keys.window.contiguous(), entries, layout.oldest.contiguous(), *ranges, picks, sink)
    return (*numbers, *given), most, num_picks * query.shape[3]


def forward(query: Tensor, keys: Keys, sink: Tensor, scale: float) -> Tensor:
    """Output [B, T, H, C]; arguments as `sink_attention`."""
    query = query.contiguous()
    arguments, most, gathered = _arguments(query, keys, sink, scale)
    out, (num_rows, length, heads, width) = torch.empty_like(query), query.shape

    def part(rows: slice) -> None:
        work, places = torch.empty(heads * most + gathered), torch.empty(2 * heads, dtype=torch.int64)
        call("range_attention", "range_forward", rows.start, rows.stop, *arguments, out, work, places)

    in_parts(part, even(num_rows * length, heads * width))
    return out


def backward(
    query: Tensor, keys: Keys, sink: Tensor, scale: float, output: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Gradients of query, window, entries (None without) and sink.

    Neighbouring parts of the queries share keys of the window, so every other part goes first; entries, which
    all may share, and the sink get a sum for each part that runs beside others.
    """
    query, output, grad = query.contiguous(), output.contiguous(), grad.contiguous()
    arguments, most, gathered = _arguments(query, keys, sink, scale)
    assert keys.window is not None
    num_rows, length, heads, _ = query.shape
    parts = fixed(num_rows * length)
    if parts[0].stop < keys.size:  # a part would reach beyond its neighbour
        parts = [slice(0, num_rows * length)]
    sums = -(-len(parts) // 2)
    d_query, d_window = torch.empty_like(query), torch.zeros(keys.window.shape)
    d_entries = None if keys.entries is None else torch.zeros(sums, *keys.entries.shape)
    d_sink = torch.zeros(len(parts), heads)

    def part(rows: slice) -> None:
        which = number(rows, parts)
        work, places = torch.empty(2 * heads * most + gathered), torch.empty(2 * heads, dtype=torch.int64)
        own = None if d_entries is None else d_entries[which // 2]
        given = (*arguments, output, grad, d_query, d_window, own, d_sink[which], work, places)
        call("range_attention", "range_backward", rows.start, rows.stop, *given)

    in_parts(part, parts[::2])
    in_parts(part, parts[1::2])
    return d_query, d_window, None if d_entries is None else d_entries.sum(0), d_sink.sum(0)
