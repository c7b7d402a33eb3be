"""Attention of packed rows and chunks on a CPU, query by query (range_attention.c); twin: sink_attention.py.

A query sees two short ranges of keys. Batched products over blocks of queries compute more than is seen, and
pass over the logits once for the mask, the sink, the softmax and each factor; here those stay in cache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from consilience.model.kernels.compiled import call, even_parts, fixed_parts, library

if TYPE_CHECKING:
    from consilience.model.kernels.attention_keys import Keys


def is_available(query: Tensor) -> bool:
    """Whether attention can go through the compiled kernel: fp32 on the CPU, and a compiler was found."""
    fits = query.device.type == "cpu" and query.dtype == torch.float32
    return fits and not isinstance(library("range_attention"), str)


def _arguments(query: Tensor, keys: Keys, sink: Tensor, scale: float, parts: int) -> tuple[tuple, int, int]:
    """What both functions begin with; the most keys of a query; floats that picked keys take."""
    assert keys.window is not None
    layout, windows, picks = keys.layout, keys.windows, keys.picks
    num_picks = 0 if picks is None else picks.shape[2]
    num_entries = 0 if keys.entries is None else keys.entries.shape[1]
    entries = None if keys.entries is None else keys.entries.contiguous()
    most = keys.size + (num_picks or num_entries)
    numbers = (*query.shape, keys.window.shape[1], num_entries, num_picks, layout.offset, most, parts, scale)
    ranges = (None, None) if windows is None else (windows.first.contiguous(), windows.stop.contiguous())
    picks = None if picks is None else picks.contiguous()
    given = (query, keys.window.contiguous(), entries, layout.oldest.contiguous(), *ranges, picks, sink)
    return (*numbers, *given), most, num_picks * query.shape[3]


def forward(query: Tensor, keys: Keys, sink: Tensor, scale: float) -> Tensor:
    """Output [B, T, H, C]; arguments as `sink_attention`."""
    query = query.contiguous()
    num_rows, length, heads, width = query.shape
    parts = even_parts(num_rows * length, heads * width)
    arguments, most, gathered = _arguments(query, keys, sink, scale, parts)
    work = query.new_empty(parts, heads * most + gathered)
    places = torch.empty(parts, 2 * heads, dtype=torch.int64)
    out = torch.empty_like(query)
    call("range_attention", "range_forward", *arguments, out, work, places)
    return out


def backward(
    query: Tensor, keys: Keys, sink: Tensor, scale: float, output: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Gradients of query, window, entries (None without) and sink."""
    query = query.contiguous()
    num_rows, length, heads, _ = query.shape
    parts = fixed_parts(num_rows * length)
    if num_rows * length < parts * keys.size:  # a part would share keys with more than its neighbours
        parts = 1
    arguments, most, gathered = _arguments(query, keys, sink, scale, parts)
    assert keys.window is not None
    d_query, d_window = torch.empty_like(query), torch.zeros(keys.window.shape)
    d_entries = None if keys.entries is None else torch.zeros((parts + 1) // 2, *keys.entries.shape)
    d_sink = torch.zeros(parts, heads)
    work = query.new_empty(parts, 2 * heads * most + gathered)
    places = torch.empty(parts, 2 * heads, dtype=torch.int64)
    given = (output.contiguous(), grad.contiguous(), d_query, d_window, d_entries, d_sink)
    call("range_attention", "range_backward", *arguments, *given, work, places)
    return d_query, d_window, None if d_entries is None else d_entries.sum(0), d_sink.sum(0)
