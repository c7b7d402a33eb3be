"""Gradients of attention's keys (Triton), from the weights that triton_attention_backward.py writes.

  ranges    a block of keys sums Pᵀ·dO + scale · dSᵀ·Q over all queries that see it
  rows      the same for the picked entries of one query: a row a pick, which `sums` adds entry by entry
As keys are values, one gradient row a key holds both.

B rows, T queries, H heads (padded to P), C head width, N keys (window keys or entries), K picks, W window,
n queries of a range, weights [B, n, W or N or K, 2, P].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from consilience.model.kernels import attention_problem
from consilience.model.kernels.attention_problem import Problem

PROGRAMS = 132  # a launch is split until it has about so many programs: the SMs of an H100


@dataclass(frozen=True)
class KeyTile:
    """keys or picks of a block; channels of a block; rows (query, head) of a step; the launch's numbers."""

    keys: int
    channels: int
    rows: int
    warps: int
    stages: int


# By bytes an element and by whether a row of keys has more than 128 channels.
RANGES = {(2, True): KeyTile(128, 256, 32, 8, 3), (2, False): KeyTile(64, 128, 64, 4, 3)}
ROWS = {(2, True): KeyTile(64, 256, 0, 8, 2), (2, False): KeyTile(64, 128, 0, 4, 2)}
SMALL = KeyTile(32, 32, 16, 4, 1)  # fp32
SUM_TILE = 16  # rows added at once


@triton.jit(
    do_not_specialize=[
        "num_queries",
        "num_keys",
        "num_heads",
        "offset",
        "size",
        "begin",
        "end",
        "num_far",
        "first_block",
        "num_splits",
    ]
)
def _ranges(
    query, grad, weights, first, stop, block_begin, block_end, d_keys,
    num_queries, num_keys, num_heads, offset, size, begin, end, num_far, first_block, num_splits,
    PADDED: tl.constexpr, WIDTH: tl.constexpr, IS_FAR: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    num_parts: tl.constexpr = WIDTH // BLOCK_C
    block = first_block + tl.program_id(0) // num_parts
    split, row = tl.program_id(1), tl.program_id(2)
    key = block * BLOCK_K + tl.arange(0, BLOCK_K)
    c = tl.program_id(0) % num_parts * BLOCK_C + tl.arange(0, BLOCK_C)
    # Upstream gradients above queries: one product with P beside dS.
    r = tl.arange(0, 2 * BLOCK_R)
    is_query = r >= BLOCK_R
    if IS_FAR:
        border = row * tl.cdiv(num_keys, BLOCK_K) + block
        low, high = tl.load(block_begin + border).to(tl.int32), tl.load(block_end + border).to(tl.int32)
    else:
        low, high = block * BLOCK_K - offset, block * BLOCK_K - offset + BLOCK_K - 1 + size
    low, high = tl.maximum(low, begin), tl.minimum(high, end)
    # A step takes some queries whole, or a share of one query's heads.
    num_tokens: tl.constexpr = BLOCK_R // PADDED if PADDED < BLOCK_R else 1
    num_shares: tl.constexpr = PADDED // BLOCK_R if PADDED > BLOCK_R else 1
    SHARE: tl.constexpr = BLOCK_R // num_tokens
    num_steps = tl.cdiv(tl.maximum(high - low, 0), num_tokens) * num_shares
    each = tl.cdiv(num_steps, num_splits)
    places = ((split * tl.num_programs(2) + row) * num_keys + key).to(tl.int64)
    target = d_keys + places[:, None] * WIDTH + c[None, :]
    acc = tl.load(target, mask=(key < num_keys)[:, None], other=0.0)
    for step in range(split * each, tl.minimum(split * each + each, num_steps)):
        token = low + step // num_shares * num_tokens + r // PADDED % num_tokens
        head = step % num_shares * BLOCK_R + r % SHARE
        is_there = token < high
        at = row * num_queries + token
        if IS_FAR:
            seen_low = tl.load(first + at, mask=is_there, other=0).to(tl.int32)
            seen_high = tl.load(stop + at, mask=is_there, other=0).to(tl.int32)
            slot, num_slots = key[:, None] + tl.zeros_like(token)[None, :], num_far
        else:
            # Every place of a window holds a weight, so no load of bounds stands before the loads of weights.
            seen_low, seen_high = token + (offset + 1 - size), token + (offset + 1)
            slot, num_slots = key[:, None] - (token + (offset + 1 - size))[None, :], size
        kept = (key[:, None] >= seen_low[None, :]) & (key[:, None] < seen_high[None, :]) & is_there[None, :]
        place = (row * (end - begin) + token - begin).to(tl.int64) * num_slots
        column = r // BLOCK_R * PADDED + head
        source = weights + (place[None, :] + slot) * (2 * PADDED) + column[None, :]
        factors = tl.load(source, mask=kept, other=0.0)
        own = (at.to(tl.int64) * num_heads + head) * WIDTH
        other = tl.where(is_query, query, grad) + own
        has_row = (is_there & (head < num_heads))[:, None]
        values = tl.load(other[:, None] + c[None, :], mask=has_row, other=0.0)
        acc = tl.dot(factors, values, acc, input_precision=PRECISION)
    tl.store(target, acc, mask=(key < num_keys)[:, None])


@triton.jit(do_not_specialize=["num_queries", "num_heads", "begin", "end", "num_picks"])
def _rows(
    query, grad, weights, first, stop, rows, num_queries, num_heads, begin, end, num_picks,
    PADDED: tl.constexpr, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    num_parts: tl.constexpr = WIDTH // BLOCK_C
    token, row = begin + tl.program_id(0) // num_parts, tl.program_id(1)
    c = tl.program_id(0) % num_parts * BLOCK_C + tl.arange(0, BLOCK_C)
    r, n = tl.arange(0, 2 * PADDED), tl.arange(0, BLOCK_K)
    at = row * num_queries + token
    count = tl.minimum((tl.load(stop + at) - tl.load(first + at)).to(tl.int32), num_picks)
    head = r % PADDED
    other = tl.where(r >= PADDED, query, grad) + (at.to(tl.int64) * num_heads + head) * WIDTH
    values = tl.load(other[:, None] + c[None, :], mask=(head < num_heads)[:, None], other=0.0)
    place = (row * (end - begin) + token - begin).to(tl.int64) * num_picks
    for start in range(0, count, BLOCK_K):
        slot = place + start + n
        kept = (start + n < count)[:, None]
        factors = tl.load(weights + slot[:, None] * (2 * PADDED) + r[None, :], mask=kept, other=0.0)
        result = tl.dot(factors, values, input_precision=PRECISION).to(rows.dtype.element_ty)
        tl.store(rows + slot[:, None] * WIDTH + c[None, :], result, mask=kept)


@triton.jit
def _sums(rows, order, borders, d_entries, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    entry = tl.program_id(0).to(tl.int64)
    c, n = tl.arange(0, WIDTH), tl.arange(0, BLOCK)
    begin, end = tl.load(borders + entry).to(tl.int32), tl.load(borders + entry + 1).to(tl.int32)
    acc = tl.zeros([BLOCK, WIDTH], tl.float32)
    for start in range(begin, end, BLOCK):
        kept = start + n < end
        row = tl.load(order + start + n, mask=kept, other=0).to(tl.int64)
        acc += tl.load(rows + row[:, None] * WIDTH + c[None, :], mask=kept[:, None], other=0.0).to(tl.float32)
    target = d_entries + entry * WIDTH + c
    if end > begin:
        tl.store(target, tl.load(target) + tl.sum(acc, 0))


def padded_heads(problem: Problem) -> int:
    """P: weights are stored for so many heads, and mean nothing beyond H."""
    return max(16, triton.next_power_of_2(problem.query.shape[2]))


class KeyGradient:
    """The gradient of the window keys or the entries [B, N, C], summed in fp32 over ranges of queries.

    A launch over `num_queries` queries is split into parts that sum apart until it fills the chip.
    """

    def __init__(self, problem: Problem, is_far: bool, num_queries: int) -> None:
        keys = problem.entries if is_far else problem.window
        assert keys is not None
        rows, self.num_keys, width = keys.shape
        self.problem, self.is_far, self.dtype = problem, is_far, keys.dtype
        kind = problem.query.element_size(), width > 128
        self.tile, self.row_tile = RANGES.get(kind, SMALL), ROWS.get(kind, SMALL)
        self.channels = min(self.tile.channels, width)
        self.num_splits = 1
        if not (is_far and problem.mode == attention_problem.GATHER):
            seen = self.num_keys if is_far else min(self.num_keys, num_queries + problem.size)
            programs = triton.cdiv(seen, self.tile.keys) * (width // self.channels) * rows
            self.num_splits = max(1, min(round(PROGRAMS / programs), triton.cdiv(num_queries, 16)))
            self.begin, self.end = self._seers() if is_far else (problem.oldest, problem.oldest)
        self.sums = torch.zeros(self.num_splits, *keys.shape, dtype=torch.float32, device=keys.device)

    def _seers(self) -> tuple[Tensor, Tensor]:
        """[B, blocks]: the first query that sees a key of each block, and the one behind the last."""
        first, stop = self.problem.first, self.problem.stop
        assert first is not None and stop is not None
        start = torch.arange(0, self.num_keys, self.tile.keys, device=first.device)[None, :, None]
        sees = (first[:, None] < start + self.tile.keys) & (stop[:, None] > start)
        token = torch.arange(first.shape[1], device=first.device)
        begin = torch.where(sees, token, first.shape[1]).amin(2)
        return begin, torch.where(sees, token + 1, 0).amax(2)

    def add_range(self, weights: Tensor, grad: Tensor, begin: int, end: int) -> None:
        """Add what the queries begin … end - 1 give to keys that they see by range or by mask."""
        problem, tile = self.problem, self.tile
        rows, num_queries, num_heads, width = problem.query.shape
        first_block, last = 0, self.num_keys
        if not self.is_far:
            first_block = max(0, begin + problem.offset + 1 - problem.size) // tile.keys
            last = end + problem.offset
        blocks = triton.cdiv(last, tile.keys) - first_block
        _, _, _, _, _, first, stop, _ = problem.tensors
        _ranges[blocks * (width // self.channels), self.num_splits, rows](
            problem.query, grad, weights, first, stop, self.begin, self.end, self.sums,
            num_queries, self.num_keys, num_heads, problem.offset, problem.size, begin, end, weights.shape[2],
            first_block, self.num_splits,
            PADDED=weights.shape[4], WIDTH=width, IS_FAR=self.is_far, BLOCK_K=tile.keys,
            BLOCK_C=self.channels, BLOCK_R=tile.rows, PRECISION=_precision(grad),
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip

    def add_rows(self, weights: Tensor, grad: Tensor, begin: int, end: int) -> None:
        """Add what the queries begin … end - 1 give to each entry that they picked."""
        problem, tile = self.problem, self.row_tile
        rows, num_queries, num_heads, width = problem.query.shape
        _, _, _, picks, _, first, stop, _ = problem.tensors
        num_picks, channels = picks.shape[2], min(tile.channels, width)
        made = grad.new_empty(rows * (end - begin) * num_picks, width)
        _rows[(end - begin) * (width // channels), rows](
            problem.query, grad, weights, first, stop, made,
            num_queries, num_heads, begin, end, num_picks,
            PADDED=weights.shape[4], WIDTH=width, BLOCK_K=tile.keys, BLOCK_C=channels,
            PRECISION=_precision(grad), num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        entry = torch.arange(rows, device=picks.device)[:, None, None] * self.num_keys + picks[:, begin:end]
        # Places without a pick come last.
        last = rows * self.num_keys
        # Radix sort: half the bits, half the time.
        dtype = torch.int16 if last < 1 << 15 else torch.int32
        entry = torch.where(picks[:, begin:end] < 0, last, entry).flatten().to(dtype)
        entry, order = entry.sort(stable=True)
        every = torch.arange(last + 1, dtype=dtype, device=entry.device)
        borders = torch.searchsorted(entry, every)
        _sums[(last,)](made, order, borders, self.sums, WIDTH=width, BLOCK=SUM_TILE, num_warps=4)

    def total(self) -> Tensor:
        """[B, N, C] in the keys' dtype."""
        return self.sums.sum(0).to(self.dtype)


def _precision(x: Tensor) -> str:
    return "tf32x3" if x.element_size() == 4 else "ieee"
