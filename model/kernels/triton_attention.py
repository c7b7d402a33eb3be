"""Attention over a window and compressed entries with sinks, forward (Triton); twin: sink_attention.py.

A program takes BLOCK_Q queries × BLOCK_H heads, the rows of one product against keys that all of them share:
the tiles of BLOCK_N window keys, then the tiles of entries. As keys are values, a tile is loaded once and
serves both products. Logits are in base 2; the running maximum starts at the sink, the running sum at 1.
Sums of 64 heads of 512 channels fill half a chip's registers. Where a query sees few keys, two programs share
its channels and compute its logits twice: then two fit, and one loads and stores while the other multiplies.

B rows, T queries, H heads, C head width, S window keys, M entries, K picks of a query.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from consilience.model.kernels import attention_problem
from consilience.model.kernels.attention_problem import Problem

LOG2_E = tl.constexpr(1.4426950408889634)
NONE, MASK, GATHER = (
    tl.constexpr(mode) for mode in (attention_problem.NONE, attention_problem.MASK, attention_problem.GATHER)
)
LENGTHS = ["num_queries", "num_window", "num_entries", "num_picks", "num_heads", "offset"]


@dataclass(frozen=True)
class Tile:
    """rows = BLOCK_Q · BLOCK_H at most; keys = BLOCK_N; the launch's warps and stages; the channels that a
    program writes: all, or half of them, when it computes logits that another one computes too."""

    rows: int
    keys: int
    warps: int
    stages: int
    channels: int = 512


# By bytes an element, whether a row of keys has more than 128 channels, and whether picks are gathered (whose
# loads take a stage of their own).
FORWARD = {
    (2, True, False): Tile(64, 64, 8, 2),
    (2, True, True): Tile(64, 64, 8, 3),
    (2, False, False): Tile(64, 64, 4, 3),
    (2, False, True): Tile(64, 64, 4, 3),
    (4, True, False): Tile(16, 16, 4, 1),
    (4, True, True): Tile(16, 16, 4, 1),
    (4, False, False): Tile(64, 32, 4, 1),
    (4, False, True): Tile(16, 32, 4, 1),
}


def setting_of(problem: Problem) -> tuple[int, bool, bool]:
    """The key of a launch's tile in the tables."""
    query = problem.query
    return query.element_size(), query.shape[3] > 128, problem.mode == attention_problem.GATHER


def blocks(problem: Problem, tile: Tile) -> dict[str, Any]:
    """Compile-time arguments that all kernels over queries share."""
    heads = problem.query.shape[2]
    block_h = min(max(16, triton.next_power_of_2(heads)), tile.rows)
    gathers = problem.mode == attention_problem.GATHER
    return {
        "WIDTH": problem.query.shape[3],
        "MODE": problem.mode,
        "BLOCK_Q": 1 if gathers else max(1, tile.rows // block_h),
        "BLOCK_H": block_h,
        "BLOCK_N": tile.keys,
        "PRECISION": "tf32x3" if problem.query.element_size() == 4 else "ieee",
    }


@triton.jit
def seen_by(
    chosen, oldest, first, stop, row, token, num_queries, num_picks, offset,
    MODE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Of the queries `token` [R]: bounds of the window keys and entries of each, start and number of the
    tiles of both that the block must visit."""
    at = row * num_queries + token
    near_low = tl.load(oldest + at).to(tl.int32)
    near_high = token + (offset + 1)
    near_start = tl.min(near_low)
    near_tiles = tl.cdiv(tl.max(near_high) - near_start, BLOCK_N)
    far_low, far_high = near_low, near_low
    far_start, far_tiles = 0, 0
    if MODE != NONE:
        far_low = tl.load(first + at).to(tl.int32)
        far_high = tl.load(stop + at).to(tl.int32)
        if MODE == GATHER:
            # Places in the list of picks, not columns.
            far_high = tl.minimum(far_high - far_low, num_picks)
            far_low = tl.zeros_like(far_low)
        far_start = tl.min(tl.where(far_high > far_low, far_low, 2147483647))
        far_tiles = tl.cdiv(tl.maximum(tl.max(far_high) - far_start, 0), BLOCK_N)
        far_start = tl.where(far_tiles > 0, far_start, 0)
    return near_low, near_high, near_start, near_tiles, far_low, far_high, far_start, far_tiles


@triton.jit
def place_of(
    index, window, entries, chosen, row, token, num_queries, num_window, num_entries, num_picks,
    near_low, near_high, near_start, near_tiles, far_low, far_high, far_start,
    MODE: tl.constexpr, WIDTH: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Of tile `index`: the addresses [BLOCK_N] of its keys; which of them each query sees, and which lie
    within its bounds [R, BLOCK_N]; their positions [BLOCK_N]. What no query sees stands for some key."""
    n = tl.arange(0, BLOCK_N)
    is_far = index >= near_tiles
    start = near_start + index * BLOCK_N
    low, high, most = near_low, near_high, num_window
    base = window + row.to(tl.int64) * num_window * WIDTH
    if MODE != NONE:
        start = tl.where(is_far, far_start + (index - near_tiles) * BLOCK_N, start)
        low, high = tl.where(is_far, far_low, near_low), tl.where(is_far, far_high, near_high)
        most = tl.where(is_far, num_picks if MODE == GATHER else num_entries, num_window)
        base = tl.where(is_far, entries + row.to(tl.int64) * num_entries * WIDTH, base)
    position = start + n
    ranged = (position[None, :] >= low[:, None]) & (position[None, :] < high[:, None])
    seen = ranged
    inside = tl.maximum(tl.minimum(position, most - 1), 0)
    if MODE == MASK:
        # Once a query, not once a head.
        each = tl.minimum(tl.min(token) + tl.arange(0, BLOCK_Q), num_queries - 1)
        at = (row * num_queries + each).to(tl.int64) * num_entries
        is_inside = (position < num_entries) & is_far
        picked = tl.load(chosen + at[:, None] + inside[None, :], mask=is_inside[None, :], other=1)
        block_h: tl.constexpr = token.shape[0] // BLOCK_Q
        picked = tl.broadcast_to(picked[:, None, :], (BLOCK_Q, block_h, BLOCK_N))
        seen = ranged & (tl.reshape(picked, (BLOCK_Q * block_h, BLOCK_N)) != 0)
    if MODE == GATHER:
        at = (row * num_queries + tl.min(token)).to(tl.int64) * num_picks
        pick = tl.load(chosen + at + inside, mask=(n >= 0) & is_far, other=0).to(tl.int32)
        seen = ranged & (pick >= 0)[None, :]
        inside = tl.where(is_far, tl.maximum(pick, 0), inside)
    return base + inside.to(tl.int64) * WIDTH, seen, ranged, position


@triton.jit(do_not_specialize=LENGTHS)
def _forward(
    query, window, entries, chosen, oldest, first, stop, sink, out, lse, scale,
    num_queries, num_window, num_entries, num_picks, num_heads, offset,
    WIDTH: tl.constexpr, MODE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    num_parts: tl.constexpr = WIDTH // BLOCK_C
    part, row = tl.program_id(0) % num_parts, tl.program_id(2)
    # Later queries see more: they begin first.
    block = tl.num_programs(0) // num_parts - 1 - tl.program_id(0) // num_parts
    r, c = tl.arange(0, BLOCK_Q * BLOCK_H), part * BLOCK_C + tl.arange(0, BLOCK_C)
    # Of two halves of the channels, the one that this program does not write.
    c_rest = (1 - part) * BLOCK_C + tl.arange(0, BLOCK_C)
    head = tl.program_id(1) * BLOCK_H + r % BLOCK_H
    token = block * BLOCK_Q + r // BLOCK_H
    is_there = (head < num_heads) & (token < num_queries)
    token = tl.minimum(token, num_queries - 1)
    own = (row * num_queries + token).to(tl.int64) * num_heads + head
    q = tl.load(query + own[:, None] * WIDTH + c[None, :], mask=is_there[:, None], other=0.0)
    if num_parts == 2:
        q_rest = tl.load(query + own[:, None] * WIDTH + c_rest[None, :], mask=is_there[:, None], other=0.0)
    near_low, near_high, near_start, near_tiles, far_low, far_high, far_start, far_tiles = seen_by(
        chosen, oldest, first, stop, row, token, num_queries, num_picks, offset, MODE, BLOCK_N
    )
    factor = scale * LOG2_E
    top = tl.load(sink + head, mask=head < num_heads, other=0.0).to(tl.float32) * LOG2_E
    total = tl.full([BLOCK_Q * BLOCK_H], 1.0, tl.float32)
    acc = tl.zeros([BLOCK_Q * BLOCK_H, BLOCK_C], tl.float32)
    for index in range(near_tiles + far_tiles):
        address, seen, _, _ = place_of(
            index, window, entries, chosen, row, token, num_queries, num_window, num_entries, num_picks,
            near_low, near_high, near_start, near_tiles, far_low, far_high, far_start,
            MODE, WIDTH, BLOCK_Q, BLOCK_N,
        )  # fmt: skip
        k = tl.load(address[:, None] + c[None, :])
        if num_parts == 2:
            k_rest = tl.load(address[:, None] + c_rest[None, :])
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if num_parts == 2:
            logits = tl.dot(q_rest, tl.trans(k_rest), logits, input_precision=PRECISION)
        logits *= factor
        p, shrink = tl.zeros([BLOCK_Q * BLOCK_H, BLOCK_N], k.dtype), top
        # Always true. Without the branch the compiler sees one product feed another and gives every group
        # of warps all columns of the first, which it then computes once a group.
        if num_queries > 0:
            logits = tl.where(seen, logits, float("-inf"))
            higher = tl.maximum(top, tl.max(logits, 1))
            wide = tl.exp2(logits - higher[:, None])
            shrink = tl.exp2(top - higher)
            total = total * shrink + tl.sum(wide, 1)
            top, p = higher, wide.to(k.dtype)
        acc = tl.dot(p, k, acc * shrink[:, None], input_precision=PRECISION)
    acc = acc / total[:, None]
    tl.store(out + own[:, None] * WIDTH + c[None, :], acc.to(out.dtype.element_ty), mask=is_there[:, None])
    tl.store(lse + own, top + tl.log2(total), mask=is_there & (part == 0))


def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    """Output [B, T, H, C] in the query's dtype and log2 of the softmax' denominator [B, T, H] fp32."""
    rows, num_queries, num_heads, width = problem.query.shape
    tile = FORWARD[setting_of(problem)]
    out = torch.empty_like(problem.query)
    lse = torch.empty(rows, num_queries, num_heads, dtype=torch.float32, device=out.device)
    sizes, channels = blocks(problem, tile), min(tile.channels, width)
    num_blocks = triton.cdiv(num_queries, sizes["BLOCK_Q"]) * (width // channels)
    _forward[num_blocks, triton.cdiv(num_heads, sizes["BLOCK_H"]), rows](
        *problem.tensors, out, lse, problem.scale, *problem.lengths,
        BLOCK_C=channels, **sizes,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out, lse
