"""What the index loss asks of every query and its candidate entries, in Triton; twin: `indexer.index_loss`.

`match`: attention's probability on each candidate, summed over heads (from the saved denominators: one
product with the entries, none with the window), or the index score of each. `query_gradient` and
`add_key_gradient`: what dI, the gradient of the scores, means for index queries, weights and keys. Candidates
are picks, gathered query by query, or all columns that a query sees. The gradient of the keys walks dense dI,
query by query under each block of keys: one writer a block, no atomics.

Floor at 32,768 tokens, 512 picks, 64 heads: the mass 1.4 ms of product (17 GB gathered from the second-level
cache: 3.4 ms), the scores 0.2 (0.8), the query's gradient 0.4 (0.8), the keys' 5.5 ms over all columns.

Shapes: T queries, n of them at once, H heads, C channels, M keys, S slots of a query: picks or columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from consilience.model.kernels.triton_index_scores import rounded

LOG2_E = 1.4426950408889634
LENGTHS = ["begin", "end", "num_keys", "num_slots", "stride"]


@dataclass(frozen=True)
class Tile:
    """keys of a step; the launch's warps and stages."""

    keys: int
    warps: int
    stages: int


# By bytes an element and by whether a key has more than 128 channels.
MATCH = {
    (2, True): Tile(64, 4, 2),
    (2, False): Tile(128, 4, 2),
    (4, True): Tile(16, 4, 1),
    (4, False): Tile(32, 4, 1),
}
QUERY_GRADIENT = {2: Tile(64, 4, 2), 4: Tile(32, 4, 1)}
KEY_GRADIENT = {2: Tile(128, 8, 2), 4: Tile(32, 4, 1)}
PROGRAMS = (
    264  # queries of a block of keys are shared by so many programs a launch, two for each SM of an H100
)


@dataclass(frozen=True)
class Candidates:
    """Slots of the queries of one row: picks [T, S] int64 (-1 behind them), or None for all visible columns.

    first, stop [T] int64: query t sees the columns first[t] … stop[t] - 1 of `num_slots`.
    """

    picks: Tensor | None
    first: Tensor
    stop: Tensor
    num_slots: int

    @property
    def given(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.first if self.picks is None else self.picks, self.first, self.stop


@triton.jit
def _span(first, stop, token, num_slots, IS_PICKED: tl.constexpr, BLOCK_N: tl.constexpr):
    """First tile and end of the slots that a query looks at, and its bounds."""
    low, high = tl.load(first + token).to(tl.int32), tl.load(stop + token).to(tl.int32)
    if IS_PICKED:
        high = tl.minimum(high - low, num_slots)
        low = low * 0
    high = tl.minimum(high, num_slots)
    return tl.minimum(low, tl.maximum(high, 0)) // BLOCK_N, low, high


@triton.jit
def _keys_of(
    keys, picks, token, slot, low, high, num_slots, c,
    WIDTH: tl.constexpr, IS_PICKED: tl.constexpr,
):  # fmt: skip
    """Keys [BLOCK_N, BLOCK_C] of a query's slots, and which of them are candidates."""
    seen = (slot >= low) & (slot < high)
    column = slot.to(tl.int64)
    if IS_PICKED:
        column = tl.load(picks + token.to(tl.int64) * num_slots + slot, mask=seen, other=-1)
        seen = seen & (column >= 0)
    there = seen[:, None] & (c < WIDTH)[None, :]
    return tl.load(keys + column[:, None] * WIDTH + c[None, :], mask=there, other=0.0), seen


@triton.jit(do_not_specialize=LENGTHS)
def _match(
    query, factor, keys, picks, first, stop, out, scale, begin, num_slots, stride,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, IS_PICKED: tl.constexpr, IS_MASS: tl.constexpr,
    IS_CUT: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64)
    token = begin + tl.program_id(0)
    h, c, n = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_N)
    own = token.to(tl.int64) * HEADS + h
    inside = (h < HEADS)[:, None] & (c < WIDTH)[None, :]
    q = tl.load(query + own[:, None] * WIDTH + c[None, :], mask=inside, other=0.0)
    # A head that is not there has weight 0, and an infinite denominator.
    f = tl.load(factor + own, mask=h < HEADS, other=float("inf") if IS_MASS else 0.0)
    tile, low, high = _span(first, stop, token, num_slots, IS_PICKED, BLOCK_N)
    for i in range(tile, tl.cdiv(high, BLOCK_N)):
        slot = i * BLOCK_N + n
        k, seen = _keys_of(keys, picks, token, slot, low, high, num_slots, c, WIDTH, IS_PICKED)
        x = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        if IS_MASS:
            total = tl.sum(tl.exp2(x * scale - f[None, :]), 1)
        else:
            total = tl.sum(tl.maximum(x, 0.0) * f[None, :], 1)
        if IS_CUT:
            total = rounded(total)
        tl.store(out + place * stride + slot, total, mask=seen)


@triton.jit(do_not_specialize=LENGTHS)
def _query_gradient(
    query, weight, keys, picks, first, stop, d_scores, unit, d_query, d_weight, begin, num_slots, stride,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, IS_PICKED: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64)
    token = begin + tl.program_id(0)
    h, c, n = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_N)
    own = token.to(tl.int64) * HEADS + h
    inside = (h < HEADS)[:, None] & (c < WIDTH)[None, :]
    q = tl.load(query + own[:, None] * WIDTH + c[None, :], mask=inside, other=0.0)
    w = tl.load(weight + own, mask=h < HEADS, other=0.0)
    d_q = tl.zeros([BLOCK_H, BLOCK_C], tl.float32)
    d_w = tl.zeros([BLOCK_H], tl.float32)
    tile, low, high = _span(first, stop, token, num_slots, IS_PICKED, BLOCK_N)
    for i in range(tile, tl.cdiv(high, BLOCK_N)):
        slot = i * BLOCK_N + n
        k, seen = _keys_of(keys, picks, token, slot, low, high, num_slots, c, WIDTH, IS_PICKED)
        d = tl.load(d_scores + place * stride + slot, mask=seen, other=0.0)
        x = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        d_w += tl.sum(tl.maximum(x, 0.0) * d[None, :], 1)
        d_x = tl.where(x > 0.0, w[:, None] * d[None, :], 0.0).to(k.dtype)
        d_q = tl.dot(d_x, k, d_q, input_precision=PRECISION)
    one = tl.load(unit)
    target = d_query + own[:, None] * WIDTH + c[None, :]
    tl.store(target, (d_q * one).to(d_query.dtype.element_ty), mask=inside)
    tl.store(d_weight + own, d_w * one, mask=h < HEADS)


@triton.jit(do_not_specialize=LENGTHS)
def _key_gradient(
    query, weight, keys, first, stop, d_scores, sums, begin, end, num_keys, stride,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    h, c = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_C)
    start = tl.program_id(0) * BLOCK_N
    key = start + tl.arange(0, BLOCK_N)
    there = (key < num_keys)[:, None] & (c < WIDTH)[None, :]
    at = key.to(tl.int64)[:, None] * WIDTH + c[None, :]
    k = tl.load(keys + at, mask=there, other=0.0)
    # Which queries of the range see a key of the block.
    lowest, highest = end, begin
    for i in range(tl.cdiv(end - begin, BLOCK_T)):
        t = begin + i * BLOCK_T + tl.arange(0, BLOCK_T)
        low = tl.load(first + t, mask=t < end, other=0)
        high = tl.load(stop + t, mask=t < end, other=0)
        sees = (low < start + BLOCK_N) & (high > start) & (high > low)
        lowest = tl.minimum(lowest, tl.min(tl.where(sees, t, end)))
        highest = tl.maximum(highest, tl.max(tl.where(sees, t + 1, begin)))
    split, num_splits = tl.program_id(1), tl.num_programs(1)
    each = tl.cdiv(tl.maximum(highest - lowest, 0), num_splits)
    target = sums + split.to(tl.int64) * num_keys * WIDTH + at
    acc = tl.load(target, mask=there, other=0.0)
    for token in range(lowest + split * each, tl.minimum(lowest + split * each + each, highest)):
        own = tl.cast(token, tl.int64) * HEADS + h
        inside = (h < HEADS)[:, None] & (c < WIDTH)[None, :]
        q = tl.load(query + own[:, None] * WIDTH + c[None, :], mask=inside, other=0.0)
        w = tl.load(weight + own, mask=h < HEADS, other=0.0)
        d = tl.load(
            d_scores + tl.cast(token - begin, tl.int64) * stride + key, mask=key < num_keys, other=0.0
        )
        x = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        d_x = tl.where(x > 0.0, d[:, None] * w[None, :], 0.0).to(q.dtype)
        acc = tl.dot(d_x, q, acc, input_precision=PRECISION)
    tl.store(target, acc, mask=there)


def _sizes(query: Tensor, tile: Tile) -> dict[str, int | str]:
    """Compile-time arguments that all kernels share."""
    _, heads, width = query.shape
    return {
        "HEADS": heads,
        "WIDTH": width,
        "BLOCK_H": max(16, triton.next_power_of_2(heads)),
        "BLOCK_N": tile.keys,
        "BLOCK_C": max(16, triton.next_power_of_2(width)),
        "PRECISION": "tf32x3" if query.element_size() == 4 else "ieee",
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def match(
    query: Tensor,
    factor: Tensor,
    keys: Tensor,
    slots: Candidates,
    begin: int,
    out: Tensor,
    mass_scale: float | None,
    is_cut: bool = False,
) -> None:
    """Fill out [n, S] fp32, of queries begin … begin + n - 1 of one row, at their candidates alone.

    query [T, H, C], keys [M, C]. With mass_scale: Σ_h exp(q_h · K · mass_scale) / Z_h, factor [T, H] fp32
    holding log2 Z; without: Σ_h factor_h · ReLU(q_h · K), rounded to bf16 if is_cut.
    """
    tile = MATCH[query.element_size(), query.shape[2] > 128]
    scale = LOG2_E * (mass_scale or 0.0)
    _match[out.shape[0],](
        query, factor, keys, *slots.given, out, scale, begin, slots.num_slots, out.stride(0),
        IS_PICKED=slots.picks is not None, IS_MASS=mass_scale is not None, IS_CUT=is_cut,
        **_sizes(query, tile),
    )  # fmt: skip


def query_gradient(
    index: tuple[Tensor, Tensor, Tensor],
    slots: Candidates,
    begin: int,
    d_scores: Tensor,
    unit: Tensor,
    d_query: Tensor,
    d_weight: Tensor,
) -> None:
    """Fill rows begin … begin + n - 1 of d_query [T, H, C] and d_weight [T, H] from d_scores [n, S] · unit.

    index = (query, weight, keys); unit is an fp32 scalar.
    """
    query, weight, keys = index
    _query_gradient[d_scores.shape[0],](
        query, weight, keys, *slots.given, d_scores, unit, d_query, d_weight, begin, slots.num_slots,
        d_scores.stride(0), IS_PICKED=slots.picks is not None,
        **_sizes(query, QUERY_GRADIENT[query.element_size()]),
    )  # fmt: skip


def key_sums(query: Tensor, num_keys: int) -> Tensor:
    """Zeros [splits, M, C] fp32 for `add_key_gradient`: their sum over splits is the gradient."""
    blocks = triton.cdiv(num_keys, KEY_GRADIENT[query.element_size()].keys)
    splits = max(1, min(PROGRAMS // max(blocks, 1), triton.cdiv(query.shape[0], 16)))
    return torch.zeros(splits, num_keys, query.shape[2], dtype=torch.float32, device=query.device)


def add_key_gradient(
    index: tuple[Tensor, Tensor, Tensor],
    slots: Candidates,
    begin: int,
    d_scores: Tensor,
    sums: Tensor,
) -> None:
    """Add to `sums` what queries begin … begin + n - 1 give to keys: d_scores [n, M] of every column.

    d_scores is 0 where a column is no candidate.
    """
    query, weight, keys = index
    tile = KEY_GRADIENT[query.element_size()]
    _key_gradient[triton.cdiv(keys.shape[0], tile.keys), sums.shape[0]](
        query, weight, keys, slots.first, slots.stop, d_scores, sums, begin, begin + d_scores.shape[0],
        keys.shape[0], d_scores.stride(0), BLOCK_T=256, **_sizes(query, tile),
    )  # fmt: skip
