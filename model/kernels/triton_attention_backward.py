"""Attention's backward (Triton): no atomics, every sum in a fixed order; twin: sink_attention.py.

Over a range of queries whose weights fit a bounded buffer:
  weights    programs by queries compute logits and their gradients anew, and write P and scale · dS
  d_query    programs by queries and channels sum dQ = scale · dS·K
  keys       programs by keys sum Pᵀ·dO + scale · dSᵀ·Q (triton_attention_keys.py)
On Hopper, picked entries take one launch instead (triton_attention_backward_gluon.py).
No logit is computed twice: 5 products a visible key. Each launch is one product whose operands stream: dQ's
sums beside the two products of the weights would leave no registers and no shared memory to load ahead.

B rows, T queries, H heads (padded to P), C head width, S window keys, M entries, K picks, W window,
n queries of a range, weights [B, n, W, 2, P] of window keys and [B, n, M or K, 2, P] of entries.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from consilience.model.kernels import attention_problem
from consilience.model.kernels.attention_problem import Problem
from consilience.model.kernels.triton_attention import (
    LENGTHS,
    LOG2_E,
    NONE,
    Tile,
    blocks,
    place_of,
    seen_by,
    setting_of,
)
from consilience.model.kernels.triton_attention_keys import KeyGradient, padded_heads

# Keys as FORWARD's.
WEIGHTS = {
    (2, True, False): Tile(64, 64, 8, 1),
    (2, True, True): Tile(64, 64, 8, 1),
    (2, False, False): Tile(64, 64, 4, 1),
    (2, False, True): Tile(64, 64, 4, 1),
    (4, True, False): Tile(16, 16, 4, 1),
    (4, True, True): Tile(16, 16, 4, 1),
    (4, False, False): Tile(64, 16, 4, 1),
    (4, False, True): Tile(16, 16, 4, 1),
}
D_QUERY = {
    (2, True, False): Tile(64, 32, 4, 5, 256),
    (2, True, True): Tile(64, 32, 4, 5, 256),
    (2, False, False): Tile(64, 64, 4, 2),
    (2, False, True): Tile(64, 64, 4, 3),
    (4, True, False): Tile(16, 16, 4, 1),
    (4, True, True): Tile(16, 16, 4, 1),
    (4, False, False): Tile(64, 16, 4, 1),
    (4, False, True): Tile(16, 16, 4, 1),
}
BUDGET = 1 << 30  # bytes of weights and rows held at once


@triton.jit
def slots_of(
    token, position, is_far, place, near_weights, far_weights, offset, size, num_far,
    PADDED: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Addresses [R, BLOCK_N] of the first head's weights of a tile's keys, for queries `token` [R]."""
    first_slot, num_slots, target = token + (offset + 1 - size), size, near_weights
    if MODE != NONE:
        first_slot, num_slots = tl.where(is_far, 0, first_slot), tl.where(is_far, num_far, size)
        target = tl.where(is_far, far_weights, near_weights)
    slot = (place * num_slots - first_slot)[:, None] + position[None, :]
    return target + slot * (2 * PADDED)


@triton.jit
def _stacked(
    query, grad, row, start, num_queries, num_heads, end, c,
    BLOCK_Q: tl.constexpr, BLOCK_H: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """8 rows of queries, their upstream gradients, the next 8: [2 BLOCK_Q BLOCK_H, WIDTH].

    One product of it with the keys gives logits and dP. A thread of a warp group's product holds rows 8
    apart, so it has both of a pair.
    """
    rows = tl.arange(0, 2 * BLOCK_Q * BLOCK_H)
    of_both = rows // 16 * 8 + rows % 8
    head = tl.program_id(1) * BLOCK_H + of_both % BLOCK_H
    token = start + of_both // BLOCK_H
    place = (row * num_queries + token).to(tl.int64) * num_heads + head
    start_of = tl.where(rows // 8 % 2 == 0, query, grad)
    is_there = (head < num_heads) & (token < end)
    return tl.load(start_of[:, None] + place[:, None] * WIDTH + c[None, :], mask=is_there[:, None], other=0.0)


@triton.jit(do_not_specialize=[*LENGTHS, "size", "begin", "end", "num_far"])
def _weights(
    query, window, entries, chosen, oldest, first, stop, sink, out, lse, grad, d_sink,
    near_weights, far_weights, scale,
    num_queries, num_window, num_entries, num_picks, num_heads, offset, size, begin, end, num_far,
    PADDED: tl.constexpr, WIDTH: tl.constexpr, MODE: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = BLOCK_Q * BLOCK_H
    block, row = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(2)
    r, c = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    head = tl.program_id(1) * BLOCK_H + r % BLOCK_H
    token = begin + block * BLOCK_Q + r // BLOCK_H
    is_there = (head < num_heads) & (token < end)
    count = (end - begin - block * BLOCK_Q) * BLOCK_H
    token = tl.minimum(token, end - 1)
    own = (row * num_queries + token).to(tl.int64) * num_heads + head
    at = own[:, None] * WIDTH + c[None, :]
    upstream = tl.load(grad + at, mask=is_there[:, None], other=0.0).to(tl.float32)
    delta = tl.sum(upstream * tl.load(out + at, mask=is_there[:, None], other=0.0).to(tl.float32), 1)
    bottom = tl.load(lse + own, mask=is_there, other=0.0)
    factor = scale * LOG2_E
    sinks = tl.load(sink + head, mask=head < num_heads, other=0.0).to(tl.float32) * LOG2_E
    tl.store(d_sink + own, -delta * tl.exp2(sinks - bottom), mask=is_there)

    stacked = _stacked(
        query, grad, row, begin + block * BLOCK_Q, num_queries, num_heads, end, c, BLOCK_Q, BLOCK_H, WIDTH
    )
    near_low, near_high, near_start, near_tiles, far_low, far_high, far_start, far_tiles = seen_by(
        chosen, oldest, first, stop, row, token, num_queries, num_picks, offset, MODE, BLOCK_N
    )
    # All places of a window get weights, zeros where a sample begins inside it.
    window_low = token + (offset + 1 - size)
    near_start = tl.min(window_low)
    near_tiles = tl.cdiv(tl.max(near_high) - near_start, BLOCK_N)
    place = (row * (end - begin) + token - begin).to(tl.int64)
    # A tile of keys waits in registers while the one before it is worked on: beside `stacked`, shared memory
    # holds but one. Addresses are a tile ahead of that, as picks take a load of their own.
    address, _, _, _ = place_of(
        0, window, entries, chosen, row, token, num_queries, num_window, num_entries, num_picks,
        window_low, near_high, near_start, near_tiles, far_low, far_high, far_start,
        MODE, WIDTH, BLOCK_Q, BLOCK_N,
    )  # fmt: skip
    k = tl.load(address[:, None] + c[None, :])
    address, _, _, _ = place_of(
        1, window, entries, chosen, row, token, num_queries, num_window, num_entries, num_picks,
        window_low, near_high, near_start, near_tiles, far_low, far_high, far_start,
        MODE, WIDTH, BLOCK_Q, BLOCK_N,
    )  # fmt: skip
    for index in range(near_tiles + far_tiles):
        _, seen, ranged, position = place_of(
            index, window, entries, chosen, row, token, num_queries, num_window, num_entries, num_picks,
            window_low, near_high, near_start, near_tiles, far_low, far_high, far_start,
            MODE, WIDTH, BLOCK_Q, BLOCK_N,
        )  # fmt: skip
        seen &= (position[None, :] >= near_low[:, None]) | (index >= near_tiles)
        following = tl.load(address[:, None] + c[None, :])
        address, _, _, _ = place_of(
            index + 2, window, entries, chosen, row, token, num_queries, num_window, num_entries, num_picks,
            window_low, near_high, near_start, near_tiles, far_low, far_high, far_start,
            MODE, WIDTH, BLOCK_Q, BLOCK_N,
        )  # fmt: skip
        products = tl.dot(stacked, tl.trans(k), input_precision=PRECISION)
        # Sums of one term part the two: a split would be computed once a layout that its uses want.
        products = tl.reshape(products, [ROWS // 8, 2, 8, BLOCK_N])
        is_logit = tl.arange(0, 2)[None, :, None, None] == 0
        logits = tl.reshape(tl.sum(tl.where(is_logit, products, 0.0), 1), [ROWS, BLOCK_N])
        d_p = tl.reshape(tl.sum(tl.where(is_logit, 0.0, products), 1), [ROWS, BLOCK_N])
        p = tl.where(seen, tl.exp2(logits * factor - bottom[:, None]), 0.0)
        d_s = p * (d_p - delta[:, None]) * scale
        target = slots_of(
            token, position, index >= near_tiles, place, near_weights, far_weights, offset, size, num_far,
            PADDED, MODE,
        )  # fmt: skip
        kept = ranged & (r < count)[:, None]
        tl.store(target + head[:, None], p.to(k.dtype), mask=kept)
        tl.store(target + PADDED + head[:, None], d_s.to(k.dtype), mask=kept)
        k = following


@triton.jit(do_not_specialize=[*LENGTHS, "size", "begin", "end", "num_far"])
def _d_query(
    query, window, entries, chosen, oldest, first, stop, sink, d_query, near_weights, far_weights,
    num_queries, num_window, num_entries, num_picks, num_heads, offset, size, begin, end, num_far,
    PADDED: tl.constexpr, WIDTH: tl.constexpr, MODE: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = BLOCK_Q * BLOCK_H
    num_parts: tl.constexpr = WIDTH // BLOCK_C
    # Parts of one query run side by side and share its weights.
    part, row = tl.program_id(0) % num_parts, tl.program_id(2)
    block = tl.num_programs(0) // num_parts - 1 - tl.program_id(0) // num_parts
    r, c = tl.arange(0, ROWS), part * BLOCK_C + tl.arange(0, BLOCK_C)
    head = tl.program_id(1) * BLOCK_H + r % BLOCK_H
    token = begin + block * BLOCK_Q + r // BLOCK_H
    is_there = (head < num_heads) & (token < end)
    count = (end - begin - block * BLOCK_Q) * BLOCK_H
    token = tl.minimum(token, end - 1)
    near_low, near_high, near_start, near_tiles, far_low, far_high, far_start, far_tiles = seen_by(
        chosen, oldest, first, stop, row, token, num_queries, num_picks, offset, MODE, BLOCK_N
    )
    place = (row * (end - begin) + token - begin).to(tl.int64)
    acc = tl.zeros([ROWS, BLOCK_C], tl.float32)
    for index in range(near_tiles + far_tiles):
        address, _, ranged, position = place_of(
            index, window, entries, chosen, row, token, num_queries, num_window, num_entries, num_picks,
            near_low, near_high, near_start, near_tiles, far_low, far_high, far_start,
            MODE, WIDTH, BLOCK_Q, BLOCK_N,
        )  # fmt: skip
        source = slots_of(
            token, position, index >= near_tiles, place, near_weights, far_weights, offset, size, num_far,
            PADDED, MODE,
        )  # fmt: skip
        kept = ranged & (r < count)[:, None]
        d_s = tl.load(source + PADDED + head[:, None], mask=kept, other=0.0)
        k = tl.load(address[:, None] + c[None, :])
        acc = tl.dot(d_s, k, acc, input_precision=PRECISION)
    own = (row * num_queries + token).to(tl.int64) * num_heads + head
    at = own[:, None] * WIDTH + c[None, :]
    tl.store(d_query + at, acc.to(d_query.dtype.element_ty), mask=is_there[:, None])


def _chunks(problem: Problem, budget: int) -> Iterator[tuple[int, int]]:
    """Ranges of queries, in steps of 64, as few as the budget allows and about equally long."""
    rows, num_queries, _, width = problem.query.shape
    num_picks = problem.lengths[3] if problem.mode == attention_problem.GATHER else 0
    slots = problem.size + (num_picks or problem.num_entries)
    size = problem.query.element_size() * rows * (slots * 2 * padded_heads(problem) + num_picks * width)
    num_chunks = triton.cdiv(num_queries * size, budget)
    length = triton.cdiv(triton.cdiv(num_queries, num_chunks), 64) * 64
    for begin in range(0, num_queries, length):
        yield begin, min(begin + length, num_queries)


def _is_by_hand(problem: Problem) -> bool:
    from consilience.model.kernels.triton_attention_parts_gluon import is_available

    return is_available(problem)


def _weigh(
    problem: Problem,
    results: tuple[Tensor, Tensor],
    grad: Tensor,
    d_sink: Tensor,
    begin: int,
    end: int,
) -> tuple[Tensor, Tensor]:
    """Weights of keys and of entries of the queries begin … end - 1; writes the sink's parts."""
    rows, _, num_heads, _ = problem.query.shape
    tile, padded = WEIGHTS[setting_of(problem)], padded_heads(problem)
    num_far = problem.lengths[3] if problem.mode == attention_problem.GATHER else problem.num_entries
    near = problem.query.new_empty(rows, end - begin, problem.size, 2, padded)
    far = problem.query.new_empty(rows, end - begin, num_far, 2, padded)
    numbers = (*problem.lengths, problem.size, begin, end, num_far)
    sizes = blocks(problem, tile)
    grid = triton.cdiv(end - begin, sizes["BLOCK_Q"]), triton.cdiv(num_heads, sizes["BLOCK_H"]), rows
    if attention_problem.HAND_PLACED and _is_by_hand(problem):
        from consilience.model.kernels import triton_attention_weights_gluon

        triton_attention_weights_gluon.weigh(problem, results, grad, (near, far), d_sink, begin, end)
    else:
        _weights[grid](
            *problem.tensors, *results, grad, d_sink, near, far, problem.scale, *numbers,
            PADDED=padded, **sizes, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return near, far


def _sum_query(
    problem: Problem, weights: tuple[Tensor, Tensor], d_query: Tensor, begin: int, end: int
) -> None:
    """Writes dQ of the queries begin … end - 1."""
    rows, _, num_heads, width = problem.query.shape
    near, far = weights
    tile = D_QUERY[setting_of(problem)]
    sizes, channels = blocks(problem, tile), min(tile.channels, width)
    num_blocks = triton.cdiv(end - begin, sizes["BLOCK_Q"]) * (width // channels)
    _d_query[num_blocks, triton.cdiv(num_heads, sizes["BLOCK_H"]), rows](
        *problem.tensors, d_query, near, far,
        *problem.lengths, problem.size, begin, end, far.shape[2],
        PADDED=padded_heads(problem), BLOCK_C=channels, **sizes,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def backward(
    problem: Problem, out: Tensor, lse: Tensor, grad: Tensor, budget: int = BUDGET
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Gradients of query, window, entries (None without) and sink; of `forward`'s results and dO.

    `budget` bounds the bytes of weights and rows held at once, but never below those of 64 queries.
    """
    gathers = problem.mode == attention_problem.GATHER
    if gathers and attention_problem.HAND_PLACED and _is_by_hand(problem):
        from consilience.model.kernels import triton_attention_backward_gluon

        return triton_attention_backward_gluon.backward(problem, out, lse, grad)
    d_query, d_sink = torch.empty_like(problem.query), torch.empty_like(lse)
    chunks = list(_chunks(problem, budget))
    near = KeyGradient(problem, is_far=False, num_queries=chunks[0][1])
    far = KeyGradient(problem, is_far=True, num_queries=chunks[0][1]) if problem.num_entries else None
    for begin, end in chunks:
        weights = _weigh(problem, (out, lse), grad, d_sink, begin, end)
        _sum_query(problem, weights, d_query, begin, end)
        near.add_range(weights[0], grad, begin, end)
        if far is not None and gathers:
            far.add_rows(weights[1], grad, begin, end)
        elif far is not None:
            far.add_range(weights[1], grad, begin, end)
        del weights
    d_entries = None if problem.entries is None else torch.zeros_like(problem.entries)
    if far is not None:
        d_entries = far.total()
    return d_query, near.total(), d_entries, d_sink.sum((0, 1)).to(problem.sink.dtype)
