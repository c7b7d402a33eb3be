"""One token a row on a CPU: compression, the indexer's choice and attention (decode_attention.c).

The kernels work on the decode state where it lies: nothing is copied out of rings and blocks, and no mask is
made. The twins are `Compressor.advance`, `Indexer.pick` and `sink_attention` in PyTorch.

B rows, H heads, C head width, K picks, M entries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from consilience.model import exact
from consilience.model.kernels.compiled import call, library
from consilience.model.state import CompressorState, DecodeState

if TYPE_CHECKING:
    from consilience.model.layout import Layout


def is_available(layout: Layout, x: Tensor) -> bool:
    """Whether a forward can go through these kernels: a token a row, fp32 on the CPU, nothing traced."""
    fits = layout.is_step and layout.trace is None and not torch.is_grad_enabled() and not exact.is_on()
    fits = fits and x.device.type == "cpu" and x.dtype == torch.float32
    return fits and not isinstance(library("decode_attention"), str)


def compress(compressor: Any, values: Tensor, gates: Tensor, layout: Layout, state: CompressorState) -> None:
    """A `Compressor`'s values and gates [B, 1, series], without the position bias, into its state."""
    assert layout.state is not None
    num_rows, _, series = values.shape
    frequencies = layout.frequencies[True]
    sizes = (
        num_rows,
        compressor.width,
        compressor.ratio,
        series,
        len(frequencies),
        *_places(layout.state, state),
    )
    given = (layout.position, values, gates, compressor.ape, compressor.norm.weight, frequencies)
    kept = (layout.state.tables, state.values, state.gates, state.entries)
    work = values.new_empty(2 * compressor.width)
    call("decode_attention", "compress", *sizes, compressor.norm.eps, *given, *kept, work)


def _places(decode: DecodeState, state: CompressorState) -> tuple[int, int, int]:
    """Ring, entries a block, blocks a row."""
    return state.values.shape[1], state.entries.shape[1], decode.tables.shape[1]


def pick(
    query: Tensor, weight: Tensor, topk: int, layout: Layout, ratio: int, state: CompressorState
) -> Tensor:
    """Columns [B, 1, K] that `Indexer.pick` finds, for query [B, 1, H, C] and weight [B, 1, H]."""
    assert layout.state is not None
    num_rows, _, heads, width = query.shape
    _, per, blocks = _places(layout.state, state)
    most = blocks * per
    picks = torch.empty(num_rows, 1, topk, dtype=torch.int64)
    work, places = query.new_empty((heads + 2) * most), torch.empty(2 * heads, dtype=torch.int64)
    sizes = (num_rows, heads, width, topk, ratio, per, blocks, most)
    given = (query, weight, layout.position, state.entries, layout.state.tables)
    call("decode_attention", "pick", *sizes, *given, picks, work, places)
    return picks


def attend(
    query: Tensor,
    kv: Tensor,
    window: Tensor,
    sink: Tensor,
    scale: float,
    layout: Layout,
    compressed: tuple[int, CompressorState, Tensor | None] | None,
) -> Tensor:
    """Attention of query [B, 1, H, C] on the ring [B, ring, C] and on compressed entries -> [B, 1, H, C].

    kv [B, 1, C] goes into the ring first.
    compressed = (ratio, state, picks [B, 1, K] or None for every visible entry).
    """
    assert layout.state is not None
    num_rows, _, heads, width = query.shape
    ring, blocks = window.shape[1], layout.state.tables.shape[1]
    ratio, per, pages, picks = 1, 1, None, None
    if compressed is not None:
        ratio, state, picks = compressed
        per, pages = state.entries.shape[1], state.entries
    num_picks = 0 if picks is None else picks.shape[2]
    entries = 0 if pages is None else num_picks or blocks * per
    most, runs = layout.offset + entries, 2 + max(num_picks, blocks)
    out = torch.empty_like(query)
    work, places = query.new_empty(heads * most), torch.empty(2 * (heads + runs), dtype=torch.int64)
    sizes = (num_rows, heads, width, layout.offset, ring, ratio, per, blocks, num_picks, most, scale)
    given = (query, kv.contiguous(), window, layout.position, pages, layout.state.tables, picks, sink)
    call("decode_attention", "attend", *sizes, *given, out, work, places)
    return out
