"""Exact top-k of rows in Triton, by a search for the k-th highest score; twin: model/top_k.py.

A program holds a row's scores in registers, as unsigned integers of the same order, and finds the k-th
highest bit by bit: it counts the scores at or above a candidate, and stops as soon as exactly k are. What is
above it is taken, and of its equals the first ones, in one prefix sum: columns come out ascending, and of
equal scores the lowest column wins. Nothing is sorted.

A row longer than `LAUNCH.block` is cut: the k best of every piece, then the k best of those, as often as it
takes. Pieces and what they hand on lie in ascending order, so ties fall as in the whole row.

Floor: bytes of the scores, read once. A bit costs 3 instructions a score and a sum over the program's warps:
4,096 rows of 1,024 take some 20 µs, 32,768 rows of up to 8,192 (half of them visible) some 0.4 ms.

Shapes: n rows, N columns, K picks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class Launch:
    """Scores that a program holds at most, and how many of them a thread."""

    block: int
    per_thread: int


LAUNCH = Launch(16384, 64)


@triton.jit
def _ordered(score):
    """Unsigned integers in the scores' order: 0 for -inf, what lies below, and NaN; -0 as 0."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    signed = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    key = signed.to(tl.uint32, bitcast=True) ^ 0x80000000
    return tl.where(score > float("-inf"), key, 0)


@triton.jit(do_not_specialize=["num_columns", "width", "k"])
def _select(
    scores, columns, first, stop, picks, best, num_columns, stride, width, k,
    HAS_COLUMNS: tl.constexpr, HAS_RANGE: tl.constexpr, WANTS_BEST: tl.constexpr,
    HAS_PIECES: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    lane = tl.arange(0, BLOCK)
    column = lane
    if HAS_PIECES:
        column += piece * width
    inside = (lane < width) & (column < num_columns)
    if HAS_RANGE:
        inside = inside & (column >= tl.load(first + row)) & (column < tl.load(stop + row))
    score = tl.load(scores + row * stride + column, mask=inside, other=float("-inf"))
    key = _ordered(score)
    wanted = tl.minimum(tl.sum((key > 0).to(tl.int32)), k)
    # The highest threshold that at least `wanted` keys reach; all keys above 0 if there are no more.
    threshold = tl.full([], 0, tl.uint32)
    count, bit = BLOCK + 1, 31
    while (bit >= 0) & (count != wanted):
        candidate = threshold | (tl.full([], 1, tl.uint32) << bit)
        reached = tl.sum((key >= candidate).to(tl.int32))
        is_reached = reached >= wanted
        threshold = tl.where(is_reached, candidate, threshold)
        count = tl.where(is_reached, reached, count)
        bit -= 1
    above = (key > threshold).to(tl.int32)
    equal = ((key == threshold) & (key > 0)).to(tl.int32)
    missing = wanted - tl.sum(above)
    # One sum counts both: at most 2^15 scores, in either half of a word.
    before = tl.cumsum(above + (equal << 16)) - (above + (equal << 16))
    num_above, num_equal = before & 0xFFFF, before >> 16
    taken = (above > 0) | ((equal > 0) & (num_equal < missing))
    slot = num_above + tl.minimum(num_equal, missing)
    target = (row * tl.num_programs(1) + piece) * k
    if HAS_COLUMNS:
        chosen = tl.load(columns + row * stride + column, mask=taken, other=0)
    else:
        chosen = column.to(tl.int64)
    tl.store(picks + target + slot, chosen, mask=taken)
    rest = tl.arange(0, BLOCK_K)
    tl.store(picks + target + rest, tl.full([BLOCK_K], -1, tl.int64), mask=(rest >= wanted) & (rest < k))
    if WANTS_BEST:
        tl.store(best + target + slot, score, mask=taken)
        nothing = tl.full([BLOCK_K], float("-inf"), tl.float32)
        tl.store(best + target + rest, nothing, mask=(rest >= wanted) & (rest < k))


def select(
    scores: Tensor,
    k: int,
    first: Tensor | None = None,
    stop: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Columns [n, K] int64 of the K highest of scores [n, N] fp32 above -inf, ascending, then -1.

    Rows of `scores` may be strided. Where first and stop [n] are given, a row has the columns
    first … stop - 1, and the others are not read. `out` [n, K], contiguous, takes the result.
    """
    num_rows, num_columns = scores.shape
    picks = torch.empty(num_rows, k, dtype=torch.int64, device=scores.device) if out is None else out
    if k == 0 or num_rows == 0:
        return picks
    columns = None
    while num_columns > LAUNCH.block:
        if LAUNCH.block < 2 * k:
            raise ValueError(f"top {k} of {num_columns} columns: at most {LAUNCH.block // 2} are supported")
        pieces = triton.cdiv(num_columns, LAUNCH.block)
        part = torch.empty(num_rows, pieces * k, dtype=torch.int64, device=scores.device)
        best = torch.empty(num_rows, pieces * k, dtype=torch.float32, device=scores.device)
        _run(scores, columns, first, stop, part, best, num_columns, triton.cdiv(num_columns, pieces), k)
        scores, columns, num_columns = best, part, pieces * k
        first = stop = None
    _run(scores, columns, first, stop, picks, None, num_columns, num_columns, k)
    return picks


def _run(
    scores: Tensor,
    columns: Tensor | None,
    first: Tensor | None,
    stop: Tensor | None,
    picks: Tensor,
    best: Tensor | None,
    num_columns: int,
    width: int,
    k: int,
) -> None:
    """One round on pieces of `width` columns; `columns` are those that the scores stand for."""
    block = max(64, triton.next_power_of_2(width))
    warps = min(32, max(1, block // (32 * LAUNCH.per_thread)))
    none = scores
    pieces = triton.cdiv(num_columns, width)
    _select[scores.shape[0], pieces](
        scores, none if columns is None else columns, none if first is None else first,
        none if stop is None else stop, picks, none if best is None else best,
        num_columns, scores.stride(0), width, k,
        HAS_COLUMNS=columns is not None, HAS_RANGE=first is not None, WANTS_BEST=best is not None,
        HAS_PIECES=pieces > 1, BLOCK=block, BLOCK_K=triton.next_power_of_2(k), num_warps=warps,
    )  # fmt: skip
