"""Triton kernels of the indexer's choice while decoding: scores of all entries, then the K highest.

gpu_decode.py calls them; `Indexer.pick` and `top_k` in PyTorch define what they compute. A level of
selection cuts its input into blocks and keeps the K highest of each, in the order of their columns; the next
level works on what was kept. Of equal scores the lowest column wins, whatever the levels, and no length
leaves the GPU.

B rows, T queries of a row, H index heads, C index width, K picks, A blocks of a row, M = A·per columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

SCORES = {"keys": 128, "tiles": 2, "num_warps": 4, "num_stages": 2}
SELECT = {"block": 4096, "num_warps": 8}


@triton.jit
def _scores(
    query, weight, position, pages, tables, out,
    num_heads, width, ratio, per, table_stride, num_columns, num_tokens,
    BLOCK_H: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, TILES: tl.constexpr,
    IS_CUT: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0)
    stop = tl.minimum((tl.load(position + number).to(tl.int32) + 1) // ratio, num_columns)
    begin = tl.program_id(1) * BLOCK_N * TILES
    if begin >= stop:
        return
    stop = tl.minimum(begin + BLOCK_N * TILES, stop)
    head, channel = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_C)
    is_mine = (head < num_heads)[:, None] & (channel < width)[None, :]
    place = (number * num_heads + head).to(tl.int64)[:, None] * width + channel[None, :]
    q = tl.load(query + place, mask=is_mine, other=0.0)
    w = tl.load(weight + number * num_heads + head, mask=head < num_heads, other=0.0)
    for start in tl.range(begin, stop, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        is_seen = column < stop
        block = tl.load(tables + number // num_tokens * table_stride + column // per, mask=is_seen, other=0)
        source = (block.to(tl.int64) * per + column % per) * width
        is_key = is_seen[:, None] & (channel < width)[None, :]
        key = tl.load(pages + source[:, None] + channel[None, :], mask=is_key, other=0.0)
        match = tl.maximum(tl.dot(q, tl.trans(key), input_precision="ieee"), 0.0)
        score = tl.sum(match * w[:, None], 0)
        if IS_CUT:
            score = score.to(tl.bfloat16).to(tl.float32)
        tl.store(out + number.to(tl.int64) * num_columns + column, score, mask=is_seen)


@triton.jit
def _select(
    scores, columns, position, tables, kept_scores, kept_columns, picks, rows,
    topk, ratio, per, table_stride, num_columns, num_tokens,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, IS_FIRST: tl.constexpr, IS_LAST: tl.constexpr,
):  # fmt: skip
    number, part = tl.program_id(0), tl.program_id(1)
    at = part * BLOCK + tl.arange(0, BLOCK)
    place = number.to(tl.int64) * num_columns + at
    if IS_FIRST:
        stop = tl.minimum((tl.load(position + number).to(tl.int32) + 1) // ratio, num_columns)
        column = tl.where(at < stop, at, -1)
    else:
        column = tl.load(columns + place, mask=at < num_columns, other=-1)
    is_there = column >= 0
    score = tl.load(scores + place, mask=is_there, other=0.0)
    # Integers of the same order; 0.0 and -0.0 are equal scores with different bits.
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    is_kept = is_there
    if tl.sum(is_there.to(tl.int32), 0) > topk:
        # The K-th highest key, bit by bit: the sign first, then downwards.
        enough = tl.sum((is_there & (key >= 0)).to(tl.int32), 0) >= topk
        least = tl.where(enough, 0, -2147483648)
        for step in tl.range(0, 31):
            trial = least + (1 << (30 - step))
            enough = tl.sum((is_there & (key >= trial)).to(tl.int32), 0) >= topk
            least = tl.where(enough, trial, least)
        is_above = is_there & (key > least)
        is_tied = is_there & (key == least)
        room = topk - tl.sum(is_above.to(tl.int32), 0)
        is_kept = is_above | (is_tied & (tl.cumsum(is_tied.to(tl.int32), 0) <= room))
    target = tl.cumsum(is_kept.to(tl.int32), 0) - 1
    found = tl.sum(is_kept.to(tl.int32), 0)
    empty = tl.arange(0, BLOCK_K)
    is_empty = (empty >= found) & (empty < topk)
    if IS_LAST:
        first = number.to(tl.int64) * topk
        tl.store(picks + first + target, column.to(tl.int64), mask=is_kept)
        tl.store(picks + first + empty, tl.full((BLOCK_K,), -1, tl.int64), mask=is_empty)
        block = tl.load(tables + number // num_tokens * table_stride + column // per, mask=is_kept, other=0)
        tl.store(rows + first + target, block.to(tl.int32) * per + column % per, mask=is_kept)
        tl.store(rows + first + empty, tl.full((BLOCK_K,), -1, tl.int32), mask=is_empty)
    else:
        first = (number.to(tl.int64) * tl.num_programs(1) + part) * topk
        tl.store(kept_columns + first + target, column, mask=is_kept)
        tl.store(kept_scores + first + target, score, mask=is_kept)
        tl.store(kept_columns + first + empty, tl.full((BLOCK_K,), -1, tl.int32), mask=is_empty)


def index_scores(
    query: Tensor,
    weight: Tensor,
    position: Tensor,
    ratio: int,
    pages: Tensor,
    tables: Tensor,
    *,
    is_cut: bool,
) -> Tensor:
    """Σ_h weight_h · ReLU(query_h · key) [B, T, M] fp32 of query [B, T, H, C], weight [B, T, H] fp32 on keys
    in pages [P, per, C]; what a query at position [B, T] does not see stays unwritten. is_cut: scores in
    bf16."""
    num_rows, num_tokens, num_heads, width = query.shape
    per, t = pages.shape[1], SCORES
    num_columns = tables.shape[1] * per
    out = query.new_empty(num_rows, num_tokens, num_columns, dtype=torch.float32)
    _scores[(num_rows * num_tokens, triton.cdiv(num_columns, t["keys"] * t["tiles"]))](
        query, weight, position, pages, tables, out,
        num_heads, width, ratio, per, tables.stride(0), num_columns, num_tokens,
        BLOCK_H=max(16, triton.next_power_of_2(num_heads)), BLOCK_C=max(16, triton.next_power_of_2(width)),
        BLOCK_N=t["keys"], TILES=t["tiles"], IS_CUT=is_cut,
        num_warps=t["num_warps"], num_stages=t["num_stages"],
    )  # fmt: skip
    return out


def select(
    scores: Tensor, topk: int, position: Tensor, ratio: int, per: int, tables: Tensor
) -> tuple[Tensor, Tensor]:
    """The K highest scores [B, T, M] that queries at position [B, T] see: their columns [B, T, K] int64,
    rising, -1 where fewer are seen; and the same as int32 rows of the pages."""
    num_rows, num_tokens, num_columns = scores.shape
    numbers, wide = num_rows * num_tokens, triton.next_power_of_2(topk)
    block = max(SELECT["block"], 2 * wide)
    picks = torch.empty(num_rows, num_tokens, topk, dtype=torch.int64, device=scores.device)
    rows = torch.empty_like(picks, dtype=torch.int32)
    columns = None
    while True:
        parts = triton.cdiv(num_columns, block)
        is_last = parts == 1
        kept = scores if is_last else scores.new_empty(numbers, parts * topk)
        kept_columns = rows if is_last else torch.empty_like(kept, dtype=torch.int32)
        _select[(numbers, parts)](
            scores, columns, position, tables, kept, kept_columns, picks, rows,
            topk, ratio, per, tables.stride(0), num_columns, num_tokens,
            BLOCK=min(block, max(16, triton.next_power_of_2(num_columns))), BLOCK_K=wide,
            IS_FIRST=columns is None, IS_LAST=is_last, num_warps=SELECT["num_warps"],
        )  # fmt: skip
        if is_last:
            return picks, rows
        scores, columns, num_columns = kept, kept_columns, parts * topk
