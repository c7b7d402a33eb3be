"""Triton kernel of the compressors while decoding: a token into the rings, a closing entry into its block.

gpu_decode.py calls it; `Compressor.advance` in PyTorch defines it. One program a row: whether its window
closes is decided on the GPU.

B rows, C width of an entry, m tokens an entry, S slots of a window (2 m in CSA, m in HCA), series 2 C or C.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

COMPRESS = {"slots": 16, "num_warps": 8}


@triton.jit
def _compress(
    new_values, new_gates, ape, norm, frequencies, position, tables, values, gates, pages,
    width, ratio, series, ring, per, table_stride, num_pairs, eps,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, IS_OVERLAPPING: tl.constexpr,
):  # fmt: skip
    row, column = tl.program_id(0), tl.arange(0, BLOCK_C)
    here = tl.load(position + row).to(tl.int32)
    own = row.to(tl.int64) * ring * series
    is_mine = column < width
    halves: tl.constexpr = 2 if IS_OVERLAPPING else 1
    for half in tl.static_range(halves):
        at = half * width + column
        value = tl.load(new_values + row * series + at, mask=is_mine, other=0.0)
        gate = tl.load(new_gates + row * series + at, mask=is_mine, other=0.0)
        gate += tl.load(ape + here % ratio * series + at, mask=is_mine, other=0.0)
        tl.store(values + own + here % ring * series + at, value, mask=is_mine)
        tl.store(gates + own + here % ring * series + at, gate, mask=is_mine)
    if (here + 1) % ratio != 0:
        return
    tl.debug_barrier()  # the token's own values are read below, by other threads
    slots = ratio * halves
    top = tl.full((BLOCK_C,), float("-inf"), tl.float32)
    mass, pooled = tl.zeros((BLOCK_C,), tl.float32), tl.zeros((BLOCK_C,), tl.float32)
    for start in tl.range(0, slots, BLOCK_S):
        slot = start + tl.arange(0, BLOCK_S)
        token = here - slots + 1 + slot
        # CSA: tokens of the window before give their first series, those of this window the second.
        series_of = tl.where(slot < ratio, 0, width) if IS_OVERLAPPING else slot * 0
        place = own + (token % ring * series + series_of).to(tl.int64)
        is_seen = ((slot < slots) & (token >= 0))[:, None] & is_mine[None, :]
        logits = tl.load(gates + place[:, None] + column[None, :], mask=is_seen, other=float("-inf"))
        kept = tl.load(values + place[:, None] + column[None, :], mask=is_seen, other=0.0)
        higher = tl.maximum(top, tl.max(logits, 0))
        level = tl.where(higher == float("-inf"), 0.0, higher)
        weight, decay = tl.exp(logits - level[None, :]), tl.exp(top - level)
        mass = mass * decay + tl.sum(weight, 0)
        pooled = pooled * decay + tl.sum(weight * kept, 0)
        top = higher
    entry = (
        tl.where(is_mine, pooled / tl.where(is_mine, mass, 1.0), 0.0)
        .to(pages.dtype.element_ty)
        .to(tl.float32)
    )
    entry *= tl.rsqrt(tl.sum(entry * entry, 0) / width + eps)
    entry *= tl.load(norm + column, mask=is_mine, other=0.0).to(tl.float32)
    entry = entry.to(pages.dtype.element_ty).to(tl.float32)
    a, b = tl.split(tl.reshape(entry, (BLOCK_C // 2, 2)))
    pair = tl.arange(0, BLOCK_C // 2) - (width // 2 - num_pairs)
    is_turned = (pair >= 0) & (pair < num_pairs)
    angle = (here - (ratio - 1)).to(tl.float32) * tl.load(frequencies + pair, mask=is_turned, other=0.0)
    cos, sin = tl.cos(angle), tl.sin(angle)
    entry = tl.reshape(tl.join(a * cos - b * sin, a * sin + b * cos), (BLOCK_C,))
    number = here // ratio
    block = tl.load(tables + row * table_stride + number // per).to(tl.int64)
    place = pages + (block * per + number % per) * width + column
    tl.store(place, entry.to(pages.dtype.element_ty), mask=is_mine)


def compress(
    new_values: Tensor,
    new_gates: Tensor,
    ape: Tensor,
    norm: Tensor,
    eps: float,
    frequencies: Tensor,
    position: Tensor,
    tables: Tensor,
    state: tuple[Tensor, Tensor, Tensor],
) -> None:
    """new_values, new_gates [B, series] fp32 of tokens at position [B], gates without ape [m, series],
    into state = (values, gates [B, ring, series], pages [P, per, C]); norm [C], frequencies [pairs]."""
    values, gates, pages = state
    num_rows, ring, series = values.shape
    width, slots = pages.shape[2], ape.shape[0] * series // pages.shape[2]
    _compress[(num_rows,)](
        new_values, new_gates, ape, norm, frequencies, position, tables, values, gates, pages,
        width, ape.shape[0], series, ring, pages.shape[1], tables.stride(0), frequencies.shape[0], eps,
        BLOCK_C=triton.next_power_of_2(width), BLOCK_S=min(COMPRESS["slots"], triton.next_power_of_2(slots)),
        IS_OVERLAPPING=series == 2 * width, num_warps=COMPRESS["num_warps"],
    )  # fmt: skip
