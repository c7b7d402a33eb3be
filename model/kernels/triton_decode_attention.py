"""Triton kernels of a decoding step: attention of one to a few tokens a row on rings and blocks.

gpu_decode.py calls them; `sink_attention` and `exact_attention` in PyTorch define what they compute. A row's
keys are taken in logical order, the window's oldest first, then compressed entries, and cut into at most
SPLITS stretches whose length follows from the row's own number of keys. So a row's result is the same bits in
any company, lengths stay on the GPU, and every launch has one shape: steps can be captured in CUDA graphs.

B rows, T queries of a row, Q = B·T, H heads, C head width, W window, K picks, A blocks of a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Q [64, 512] and two tiles of keys fill 192 of the 227 KB of shared memory, the sums 128 registers a thread.
ATTEND = {"keys": 64, "num_warps": 8, "num_stages": 2}
COMBINE = {"columns": 128, "splits": 16, "num_warps": 4}
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _stretch(
    position, size, ratio, num_picks, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr, PADS: tl.constexpr
):
    """Window keys and all keys of a query at `position`, and the keys of one stretch, whole tiles. PADS:
    entries begin with a tile of their own."""
    near = tl.minimum(position + 1, size)
    total = tl.minimum((position + 1) // ratio, num_picks) + (
        tl.cdiv(near, BLOCK_N) * BLOCK_N if PADS else near
    )
    return near, total, tl.cdiv(tl.cdiv(total, SPLITS), BLOCK_N) * BLOCK_N


@triton.jit
def _attend(
    query, window, position, pages, tables, rows, sink, partial, stats, out,
    scale, num_heads, width, ring, size, ratio, per, table_stride, num_picks, num_tokens,
    SPLITS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_PAGES: tl.constexpr, HAS_ROWS: tl.constexpr, IS_EVEN: tl.constexpr,
):  # fmt: skip
    number, split = tl.program_id(0), tl.program_id(1)
    row = number // num_tokens
    here = tl.load(position + number).to(tl.int32)
    near, total, each = _stretch(here, size, ratio, num_picks, SPLITS, BLOCK_N, False)
    begin = split * each
    stop = tl.minimum(begin + each, total)
    if begin >= stop:
        return
    head = tl.program_id(2) * BLOCK_H + tl.arange(0, BLOCK_H)
    column = tl.arange(0, BLOCK_C)
    is_mine = (head < num_heads)[:, None] & (column < width)[None, :]
    place = (number * num_heads + head).to(tl.int64)[:, None] * width + column[None, :]
    q = tl.load(query + place, mask=is_mine, other=0.0)
    top = tl.full((BLOCK_H,), float("-inf"), tl.float32)
    mass = tl.zeros((BLOCK_H,), tl.float32)
    acc = tl.zeros((BLOCK_H, BLOCK_C), tl.float32)
    own = window + row.to(tl.int64) * ring * width
    for start in tl.range(begin, stop, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        is_seen = j < stop
        source = own + ((here - near + 1 + j) % ring).to(tl.int64) * width
        if HAS_PAGES:
            entry, is_entry = tl.maximum(j - near, 0), is_seen & (j >= near)
            if HAS_ROWS:
                at = tl.load(rows + number.to(tl.int64) * num_picks + entry, mask=is_entry, other=0)
                is_seen &= at >= 0
                at = tl.maximum(at, 0).to(tl.int64)
            else:
                block = tl.load(tables + row * table_stride + entry // per, mask=is_entry, other=0)
                at = block.to(tl.int64) * per + entry % per
            source = tl.where(j < near, source, pages + at * width)
        is_key = is_seen[:, None] if IS_EVEN else is_seen[:, None] & (column < width)[None, :]
        key = tl.load(source[:, None] + column[None, :], mask=is_key, other=0.0)
        logits = tl.dot(q, tl.trans(key), input_precision="ieee") * (scale * LOG2E)
        logits = tl.where(is_seen[None, :], logits, float("-inf"))
        higher = tl.maximum(top, tl.max(logits, 1))
        level = tl.where(higher == float("-inf"), 0.0, higher)
        weight, decay = tl.exp2(logits - level[:, None]), tl.exp2(top - level)
        mass = mass * decay + tl.sum(weight, 1)
        acc = tl.dot(weight.to(key.dtype), key, acc * decay[:, None], input_precision="ieee")
        top = higher
    if SPLITS == 1:
        sunk = tl.load(sink + head, mask=head < num_heads, other=0.0) * LOG2E
        level = tl.maximum(top, sunk)
        decay = tl.exp2(top - level)
        share = decay / (mass * decay + tl.exp2(sunk - level))
        tl.store(out + place, (acc * share[:, None]).to(out.dtype.element_ty), mask=is_mine)
    else:
        first = (number * SPLITS + split) * num_heads
        tl.store(stats + 2 * first + head, top, mask=head < num_heads)
        tl.store(stats + 2 * first + num_heads + head, mass, mask=head < num_heads)
        place = (first + head).to(tl.int64)[:, None] * width + column[None, :]
        tl.store(partial + place, acc, mask=is_mine)


@triton.jit
def _combine_splits(
    partial, stats, position, sink, out, num_heads, width, size, ratio, num_picks,
    SPLITS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    TILE: tl.constexpr, PADS: tl.constexpr,
):  # fmt: skip
    number, head = tl.program_id(0), tl.program_id(1)
    here = tl.load(position + number).to(tl.int32)
    _, total, each = _stretch(here, size, ratio, num_picks, SPLITS, BLOCK_N, PADS)
    used = tl.cdiv(total, each)
    split = tl.arange(0, BLOCK_S)
    first = number * SPLITS * num_heads + head
    place = stats + 2 * number * SPLITS * num_heads + split * 2 * num_heads + head
    top = tl.load(place, mask=split < used, other=float("-inf"))
    mass = tl.load(place + num_heads, mask=split < used, other=0.0)
    sunk = tl.load(sink + head) * LOG2E
    level = tl.maximum(tl.max(top, 0), sunk)
    total_mass = tl.sum(mass * tl.exp2(top - level), 0) + tl.exp2(sunk - level)
    column = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    acc = tl.zeros((BLOCK_C,), tl.float32)
    for start in tl.range(0, used, TILE):
        part = start + tl.arange(0, TILE)
        tops = stats + 2 * number * SPLITS * num_heads + part * 2 * num_heads + head
        tops = tl.load(tops, mask=part < used, other=float("-inf"))
        rows = partial + (first + part * num_heads).to(tl.int64)[:, None] * width + column[None, :]
        sums = tl.load(rows, mask=(part < used)[:, None] & (column < width)[None, :], other=0.0)
        acc += tl.sum(sums * tl.exp2(tops - level)[:, None], 0)
    place = out + (number * num_heads + head).to(tl.int64) * width + column
    tl.store(place, (acc / total_mass).to(out.dtype.element_ty), mask=column < width)


@triton.jit
def _remember(kv, window, position, width, ring, num_tokens, BLOCK: tl.constexpr):
    number, column = tl.program_id(0), tl.arange(0, BLOCK)
    slot = tl.load(position + number).to(tl.int64) % ring + (number // num_tokens).to(tl.int64) * ring
    own = tl.load(kv + number.to(tl.int64) * width + column, mask=column < width, other=0.0)
    tl.store(window + slot * width + column, own.to(window.dtype.element_ty), mask=column < width)


def remember(kv: Tensor, window: Tensor, position: Tensor) -> None:
    """Window keys kv [B, T, C] of the tokens at position [B, T] into the ring [B, ring, C], in place."""
    width = kv.shape[-1]
    _remember[(position.numel(),)](
        kv, window, position, width, window.shape[1], position.shape[1], BLOCK=triton.next_power_of_2(width)
    )


def attend(
    query: Tensor,
    window: Tensor,
    position: Tensor,
    sink: Tensor,
    scale: float,
    size: int,
    num_splits: int,
    *,
    ratio: int = 1,
    pages: Tensor | None = None,
    tables: Tensor | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """Attention [B, T, H, C] of query [B, T, H, C] at position [B, T] on the ring [B, ring, C], which holds
    the tokens' own keys already, and on entries of pages [P, per, C].

    sink [H] fp32; size = W. Of the entries a query sees the first (position + 1) // ratio, found by tables
    [B, A], or its first as many of rows [B, T, K] int32: numbers of rows of pages, -1 for none.
    """
    num_rows, num_tokens, num_heads, width = query.shape
    numbers, block_n = num_rows * num_tokens, ATTEND["keys"]
    out = torch.empty_like(query)
    partial = stats = out
    if num_splits > 1:
        partial = query.new_empty(numbers, num_splits, num_heads, width, dtype=torch.float32)
        stats = query.new_empty(numbers, num_splits, 2, num_heads, dtype=torch.float32)
    per = 1 if pages is None else pages.shape[1]
    stride, num_blocks = (0, 0) if tables is None else (tables.stride(0), tables.shape[1])
    num_picks = num_blocks * per if rows is None else rows.shape[2]
    wide = max(16, triton.next_power_of_2(width))
    tall = min(64, max(16, triton.next_power_of_2(num_heads)))
    _attend[(numbers, num_splits, triton.cdiv(num_heads, tall))](
        query, window, position, pages, tables, rows, sink, partial, stats, out,
        scale, num_heads, width, window.shape[1], size, ratio, per, stride, num_picks, num_tokens,
        SPLITS=num_splits, BLOCK_H=tall, BLOCK_C=wide, BLOCK_N=block_n, HAS_PAGES=pages is not None,
        HAS_ROWS=rows is not None, IS_EVEN=wide == width,
        num_warps=ATTEND["num_warps"], num_stages=ATTEND["num_stages"],
    )  # fmt: skip
    if num_splits > 1:
        columns = min(COMBINE["columns"], wide)
        _combine_splits[(numbers, num_heads, triton.cdiv(width, columns))](
            partial, stats, position, sink, out, num_heads, width, size, ratio, num_picks,
            SPLITS=num_splits, BLOCK_S=triton.next_power_of_2(num_splits), BLOCK_N=block_n, BLOCK_C=columns,
            TILE=min(COMBINE["splits"], triton.next_power_of_2(num_splits)), PADS=False,
            num_warps=COMBINE["num_warps"],
        )  # fmt: skip
    return out
