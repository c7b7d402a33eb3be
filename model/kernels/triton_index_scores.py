"""The lightning indexer's scores in Triton: I[t, i] = Σ_h w_h · ReLU(q_h · K_i); twin: model/indexer.py.

A program holds the heads of some queries, the columns of one product, and walks the keys that these queries
see: keys × heads matches in fp32, rectified, weighted and summed over heads before they leave the registers.
Only the columns that a query of the block sees are computed; what lies beyond them is left as it was.

Floor: the product. 64 heads × 128 channels against a quarter of the earlier tokens are 2.75 ms for 32,768
tokens at 800 TFLOP/s; ReLU, weight and sum are two more operations a match, a fourth of the product's time
where they do not overlap with it, so two programs share an SM (97 KiB of shared memory, 32 K registers each).
Keys are read from the second-level cache once for each block of queries: 256 FLOP a byte with four queries of
64 heads, 2.4 TB/s at 600 TFLOP/s. Expected 3.7 to 4.5 ms at 32,768 tokens.

Shapes: T queries, n of them scored at once, H heads, C channels, M keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class Tile:
    """rows (query, head) of a program; keys of a step; the launch's warps and stages."""

    rows: int
    keys: int
    warps: int
    stages: int


TILES = {2: Tile(256, 64, 8, 3), 4: Tile(64, 32, 4, 2)}
"""By bytes of an element."""
PROGRAMS = 528  # a launch's keys are split until it has about so many programs: four for each SM of an H100


@triton.jit(do_not_specialize=["begin", "end", "num_keys", "stride"])
def _scores(
    query, weight, keys, first, stop, scores, begin, end, num_keys, stride,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, IS_CUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Later queries see more: they begin first.
    start = begin + (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_Q
    split, num_splits = tl.program_id(1), tl.num_programs(1)
    r, c = tl.arange(0, BLOCK_Q * BLOCK_H), tl.arange(0, BLOCK_C)
    head, token = r % BLOCK_H, start + r // BLOCK_H
    is_row = (head < HEADS) & (token < end)
    own = token.to(tl.int64) * HEADS + head
    inside = is_row[:, None] & (c < WIDTH)[None, :]
    q = tl.load(query + own[:, None] * WIDTH + c[None, :], mask=inside, other=0.0)
    w = tl.load(weight + own, mask=is_row, other=0.0)
    asked = start + tl.arange(0, BLOCK_Q)
    low = tl.load(first + asked, mask=asked < end, other=0).to(tl.int32)
    high = tl.load(stop + asked, mask=asked < end, other=0).to(tl.int32)
    least = tl.min(tl.where(high > low, low, 2147483647))
    most = tl.minimum(tl.max(tl.where(high > low, high, 0)), num_keys)
    least = tl.minimum(least, most) // BLOCK_N * BLOCK_N
    num_tiles = tl.cdiv(most - least, BLOCK_N)
    each = tl.cdiv(num_tiles, num_splits)
    place = scores + (asked - begin).to(tl.int64)[None, :] * stride
    for tile in range(split * each, tl.minimum(split * each + each, num_tiles)):
        n = least + tile * BLOCK_N + tl.arange(0, BLOCK_N)
        there = (n < num_keys)[:, None] & (c < WIDTH)[None, :]
        k = tl.load(keys + n.to(tl.int64)[:, None] * WIDTH + c[None, :], mask=there, other=0.0)
        match = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        match = tl.maximum(match, 0.0) * w[None, :]
        total = tl.sum(tl.reshape(match, [BLOCK_N, BLOCK_Q, BLOCK_H]), 2)
        if IS_CUT:
            total = rounded(total)
        tl.store(place + n[:, None], total, mask=(n < most)[:, None] & (asked < end)[None, :])


@triton.jit
def rounded(x):
    """fp32 rounded to bf16's 8 bits, to the nearest, ties to even."""
    bits = x.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
    return bits.to(tl.float32, bitcast=True)


def scores(
    query: Tensor,
    weight: Tensor,
    keys: Tensor,
    first: Tensor,
    stop: Tensor,
    begin: int,
    out: Tensor,
    is_cut: bool = False,
) -> None:
    """Fill out [n, columns] fp32 with the scores of queries begin … begin + n - 1 of one row.

    query [T, H, C], weight [T, H] fp32, keys [M, C], first and stop [T] int64, contiguous. Query t's columns
    first[t] … stop[t] - 1 are written; others hold scores or what they held. is_cut rounds scores to bf16.
    """
    _, heads, width = query.shape
    num_queries, columns = out.shape
    tile = TILES[query.element_size()]
    block_h = max(16, triton.next_power_of_2(heads))
    block_q = max(1, tile.rows // block_h)
    blocks = triton.cdiv(num_queries, block_q)
    tiles = triton.cdiv(columns, tile.keys)
    splits = max(1, min(triton.cdiv(PROGRAMS, max(blocks, 1)), tiles // 4))
    _scores[blocks, splits](
        query, weight, keys, first, stop, out, begin, begin + num_queries, columns, out.stride(0),
        HEADS=heads, WIDTH=width, BLOCK_Q=block_q, BLOCK_H=block_h, BLOCK_N=tile.keys,
        BLOCK_C=max(16, triton.next_power_of_2(width)), IS_CUT=is_cut,
        PRECISION="tf32x3" if query.element_size() == 4 else "ieee",
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
