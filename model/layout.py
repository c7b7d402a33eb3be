"""Where every token of a forward stands: positions, masks and compression windows.

Built once per forward and shared by all layers. One description serves packed training rows,
prefill chunks and single-token decoding, so that the three cannot drift apart.

B rows, T tokens in a row (padded), W sliding window, M compressed entries, m compression ratio.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from consilience.model.config import CSA_RATIO, ModelConfig

if TYPE_CHECKING:
    from consilience.model.forward_trace import Trace
    from consilience.model.state import DecodeState

MASKED = float("-inf")


@dataclass(frozen=True)
class Windows:
    """Compression windows of one ratio m that close inside this forward.

    row, column [E]     where each new entry belongs in the [B, M] entry axis
    source [E, S]       index of each pooled slot in the flattened (ring ‖ new tokens) axis,
                        S = 2m for CSA (previous window first), m for HCA
    is_present [E, S]   False for slots before the sample's first token (CSA's entry 0)
    position [E]        of the window's first token, for RoPE
    num_columns         M
    bias [B, T, M]      0 where a query may see an entry, -inf elsewhere, fp32
    """

    row: Tensor
    column: Tensor
    source: Tensor
    is_present: Tensor
    position: Tensor
    num_columns: int
    bias: Tensor


@dataclass(frozen=True)
class Layout:
    """position, is_valid [B, T]; rotation tables; window bias; one `Windows` per ratio."""

    position: Tensor
    is_valid: Tensor
    sliding_rotation: Tensor
    compressed_rotation: Tensor
    frequencies: dict[bool, Tensor]
    block: int
    window_bias: Tensor
    windows: dict[int, Windows]
    state: DecodeState | None = None
    lengths: Tensor | None = None
    trace: Trace | None = field(default=None, compare=False)


def ring_size(ratio: int) -> int:
    """Raw projections a compressor keeps per sequence: two windows for CSA, one for HCA."""
    return 2 * ratio if ratio == CSA_RATIO else ratio


def as_bias(is_visible: Tensor) -> Tensor:
    """Additive fp32 mask: 0 where visible, -inf elsewhere."""
    return torch.zeros(is_visible.shape, device=is_visible.device).masked_fill_(~is_visible, MASKED)


def _windows(
    ratio: int,
    position: Tensor,
    is_valid: Tensor,
    ring: int,
    columns: tuple[Tensor, int] | None,
    segment: Tensor | None,
) -> Windows:
    """Windows of `ratio` closing in this chunk. `columns` = (first token's position [B], M) with a state."""
    num_rows, num_tokens = position.shape
    device = position.device
    closes = ((position + 1) % ratio == 0) & is_valid
    row, token = closes.nonzero(as_tuple=True)
    end = position[row, token]
    num_slots = ring_size(ratio)
    back = torch.arange(num_slots - 1, -1, -1, device=device)
    in_chunk = token[:, None] - back
    is_present = end[:, None] - back >= 0
    stride = ring + num_tokens
    source = row[:, None] * stride + ring + in_chunk
    if ring:
        earlier = row[:, None] * stride + (end[:, None] - back) % ring
        source = torch.where(in_chunk >= 0, source, earlier)
    source = torch.where(is_present, source, row[:, None] * stride)

    if columns is not None:
        num_columns = columns[1]
        column = end // ratio
        number = torch.arange(num_columns, device=device)
        is_visible = number < ((position + 1) // ratio)[:, :, None]
    else:
        rank = closes.long().cumsum(1) - 1
        column = rank[row, token]
        num_columns = int(closes.sum(1).max()) if closes.numel() else 0
        last = torch.full((num_rows, num_columns), num_tokens, device=device, dtype=torch.long)
        owner = torch.full((num_rows, num_columns), -2, device=device, dtype=torch.long)
        last[row, column] = token
        assert segment is not None
        owner[row, column] = segment[row, token].long()
        steps = torch.arange(num_tokens, device=device)
        is_visible = (steps[None, :, None] >= last[:, None]) & (segment[:, :, None] == owner[:, None])
    return Windows(row, column, source, is_present, end - (ratio - 1), num_columns, as_bias(is_visible))


def packed_layout(
    config: ModelConfig,
    frequencies: dict[bool, Tensor],
    segment: Tensor,
    position: Tensor,
    trace: Trace | None,
) -> Layout:
    """Layout of packed rows without a decode state.

    segment [B, T] int, -1 = padding; position [B, T] restarts at 0 in each segment. T must be at
    most W or a multiple of W (the model pads).
    """
    from consilience.model.rope import rotations

    num_rows, num_tokens = segment.shape
    device = segment.device
    block = min(config.sliding_window, num_tokens)
    query = torch.arange(num_tokens, device=device).view(-1, block)
    key = torch.arange(config.sliding_window + block, device=device) - config.sliding_window + query[:, :1]
    distance = query[:, :, None] - key[:, None, :]
    near = (distance >= 0) & (distance < config.sliding_window) & (key >= 0)[:, None, :]
    key_segment = segment[:, key.clamp(min=0)]
    same = segment[:, query][:, :, :, None] == key_segment[:, :, None, :]
    is_visible = near & (same | (distance == 0))
    is_valid = segment >= 0
    return Layout(
        position=position,
        is_valid=is_valid,
        sliding_rotation=rotations(position, frequencies[False]),
        compressed_rotation=rotations(position, frequencies[True]),
        frequencies=frequencies,
        block=block,
        window_bias=as_bias(is_visible).view(num_rows, num_tokens, -1),
        windows={m: _windows(m, position, is_valid, 0, None, segment) for m in config.ratios},
        trace=trace,
    )


def chunk_layout(
    config: ModelConfig,
    frequencies: dict[bool, Tensor],
    state: DecodeState,
    num_tokens: int,
    lengths: Tensor | None,
    trace: Trace | None,
) -> Layout:
    """Layout of a chunk that continues `state`: row b gets lengths[b] new tokens (None: all of T)."""
    from consilience.model.rope import rotations

    window = config.sliding_window
    start = state.position
    device = start.device
    steps = torch.arange(num_tokens, device=device)
    position = start[:, None] + steps
    if lengths is None:
        is_valid = torch.ones_like(position, dtype=torch.bool)
        end = int(start.max()) + num_tokens
    else:
        is_valid = steps < lengths[:, None]
        end = int((start + lengths).max())
    if num_tokens == 1 and lengths is None:
        block = 1
        slot = torch.arange(window, device=device)
        key = position - (position - slot) % window
        window_bias = as_bias(key >= 0)[:, None, :]
    else:
        block = min(window, num_tokens)
        query = position.view(position.shape[0], -1, block)
        key = query[:, :, :1] - window + torch.arange(window + block, device=device)
        distance = query[..., None] - key[:, :, None, :]
        is_visible = (distance >= 0) & (distance < window) & (key >= 0)[:, :, None, :]
        window_bias = as_bias(is_visible).view(*position.shape, -1)
    return Layout(
        position=position,
        is_valid=is_valid,
        sliding_rotation=rotations(position, frequencies[False]),
        compressed_rotation=rotations(position, frequencies[True]),
        frequencies=frequencies,
        block=block,
        window_bias=window_bias,
        windows={
            m: _windows(m, position, is_valid, ring_size(m), (start, end // m), None) for m in config.ratios
        },
        state=state,
        lengths=lengths,
        trace=trace,
    )
