"""Attention forward by two warp groups in turns (Gluon, Hopper); the same function as triton_attention.py's.

A program stays on its SM and takes query after query, 64 heads × 512 channels each, in three partitions. Two
of four warps hold half of the output's channels each: one makes the even tiles' probabilities, the other the
odd ones'; both add every tile's values to their half. So one's softmax runs beside the other's products. The
third copies tiles of 64 keys into two buffers, each as soon as both have done with it, and the next query.

    even    S = Q Kᵀ of tile i | softmax, P to shared memory | O += P K of tile i, then of tile i + 1
    odd     S = Q Kᵀ of tile i + 1 | O += P K of tile i beside its softmax | O += P K of tile i + 1
    output  leaves from the buffer of the last tile; the number of tiles is even, the last may be empty

B rows, T queries, H heads, S window keys, M entries, K picks of a query, W window.
Shared memory: query 64 KiB, keys 2 × 64, P 2 × 8. Registers of a group's 128 threads: O takes 128, S 32.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from consilience.model.kernels.attention_problem import Problem
from consilience.model.kernels.triton_attention_parts_gluon import (
    GATHER,
    HEADS,
    LENGTHS,
    LOG2_E,
    NONE,
    TILE,
    WIDTH,
    bounds_of,
    chip_of,
    flat,
    tensors_of,
)

# Of a warp group: the tile's logits, half of the channels of O; of the copying one, half of a row.
LOGITS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
SUMS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16]))
COPIED = gl.constexpr(gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0]))
HALF = gl.constexpr(WIDTH.value // 2)
LINE = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
COPY_REGISTERS, ODD_REGISTERS = gl.constexpr(72), gl.constexpr(208)  # of a thread; the even group gets 224


@gluon.jit
def _sum_own(x):
    """[HEADS, 4]: sums over the columns that a thread holds, which needs no other thread."""
    groups = x.reshape([HEADS, 8, 4, 2])
    return gl.sum(gl.sum(groups, 3), 1)


@gluon.jit
def _multiply(q_buffers, k_buffers, zero, SIDE: gl.constexpr):
    """Q Kᵀ of a side's tile, begun: two halves of the channels."""
    product = warpgroup_mma(
        q_buffers.index(zero), k_buffers.index(zero + 2 * SIDE).permute([1, 0]),
        gl.zeros([HEADS, TILE], gl.float32, LOGITS), use_acc=False, is_async=True,
    )  # fmt: skip
    keys = k_buffers.index(zero + 2 * SIDE + 1).permute([1, 0])
    return warpgroup_mma(q_buffers.index(zero + 1), keys, product, is_async=True)


@gluon.jit
def _is_seen(tile, place, MODE: gl.constexpr):
    """Which keys of a tile its query sees."""
    near_tiles, window_start, low, count, size, own_picks = place
    slot = tile * TILE + gl.arange(0, TILE, layout=gl.SliceLayout(0, LOGITS))
    seen = (window_start + slot >= low) & (slot < size)
    if MODE != NONE:
        far = slot - near_tiles * TILE
        seen_far = (far >= 0) & (far < count)
        if MODE == GATHER:
            seen_far = gl.load(own_picks + 2 * far, mask=seen_far, other=-1) >= 0
        seen = ((slot < near_tiles * TILE) & seen) | seen_far
    return seen


@gluon.jit
def _shrunk(sums, shrink):
    return sums * gl.convert_layout(shrink, gl.SliceLayout(1, sums.type.layout))[:, None]


@gluon.jit
def _add_other(
    p_buffers, k_buffers, tops, p_full, top, sums, acc, zero, parity, OTHER: gl.constexpr, SIDE: gl.constexpr
):
    """The other side's tile, once its P is there: (top, sums, acc), its values' addition begun."""
    mbarrier.wait(p_full.index(OTHER), parity)
    higher = tops.index(OTHER).load(gl.SliceLayout(1, LOGITS))
    shrink = gl.exp2(top - higher)
    sums, acc = _shrunk(sums, shrink), _shrunk(acc, shrink)
    keys = k_buffers.index(zero + 2 * OTHER + SIDE)
    return higher, sums, warpgroup_mma(p_buffers.index(zero + OTHER), keys, acc, is_async=True)


@gluon.jit
def _add_pair(
    q_buffers, k_buffers, p_buffers, tops, q_empty, k_full, k_empty, p_full, top, sums, acc,
    pair, done, place, factor, is_last, IS_SEEN: gl.constexpr, MODE: gl.constexpr, SIDE: gl.constexpr,
):  # fmt: skip
    """Two tiles, of which a side makes the probabilities of one: (top, sums, acc). Which keys are seen says
    IS_SEEN(tile, place, MODE)."""
    parity = done % 2
    # Zero, unseen by the compiler, which would keep the products' addresses in registers.
    zero = done >> 31
    mbarrier.wait(k_full.index(SIDE), parity)
    product = _multiply(q_buffers, k_buffers, zero, SIDE)
    seen = IS_SEEN(2 * pair + SIDE, place, MODE)
    if SIDE == 1:
        top, sums, acc = _add_other(p_buffers, k_buffers, tops, p_full, top, sums, acc, zero, parity, 0, 1)
        logits = warpgroup_mma_wait(1, deps=(product,))
    else:
        logits = warpgroup_mma_wait(0, deps=(product,))
    logits = gl.where(seen[None, :], logits * factor, float("-inf"))
    higher = gl.maximum(top, gl.max(logits, 1))
    wide = gl.exp2(logits - higher[:, None])
    shrink = gl.exp2(top - higher)
    sums = _shrunk(sums, shrink) + _sum_own(wide)
    p_buffers.index(SIDE).store(wide.to(k_buffers.dtype))
    tops.index(SIDE).store(higher)
    fence_async_shared()
    gl.thread_barrier()
    mbarrier.arrive(p_full.index(SIDE), count=1)
    mbarrier.arrive(q_empty, count=1, pred=is_last)
    if SIDE == 1:
        acc = warpgroup_mma_wait(0, deps=(acc,))
        gl.thread_barrier()
        mbarrier.arrive(k_empty.index(0), count=1)
    acc = _shrunk(acc, shrink)
    acc = warpgroup_mma(p_buffers.index(zero + SIDE), k_buffers.index(zero + 3 * SIDE), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    gl.thread_barrier()
    if SIDE == 0:
        mbarrier.arrive(k_empty.index(0), count=1)
        higher, sums, acc = _add_other(
            p_buffers, k_buffers, tops, p_full, higher, sums, acc, zero, parity, 1, 0
        )
        acc = warpgroup_mma_wait(0, deps=(acc,))
        gl.thread_barrier()
    # The last tile's buffer carries the output.
    mbarrier.arrive(k_empty.index(1), count=1, pred=not is_last)
    return higher, sums, acc


@gluon.jit
def _attend(
    q_buffers, k_buffers, p_buffers, tops, totals, q_full, q_empty, k_full, k_empty, p_full, t_full,
    picks, oldest, first, stop, sink, out, lse, scale,
    num_queries, num_picks, num_heads, offset, num_blocks, size, MODE: gl.constexpr, SIDE: gl.constexpr,
):  # fmt: skip
    """One side of the two: half of the channels of a program's queries."""
    head = gl.arange(0, HEADS, layout=gl.SliceLayout(1, LOGITS))
    num_shares = num_heads // HEADS
    near_tiles = gl.cdiv(size, TILE)
    factor = scale * LOG2_E
    block = num_blocks - 1 - gl.program_id(0)
    phase, done = 0, 0
    for _ in range(gl.program_id(0), num_blocks, gl.num_programs(0)):
        token = block // num_shares % num_queries
        low, _, count = bounds_of(block, oldest, first, stop, num_queries, num_picks, num_shares, MODE)
        tiles = near_tiles
        if MODE != NONE:
            tiles += gl.cdiv(count, TILE)
        pairs = gl.cdiv(tiles, 2)
        own = block // num_shares * num_heads + block % num_shares * HEADS
        window_start = token + (offset + 1 - size)
        own_picks = picks + (block // num_shares).to(gl.int64) * (2 * num_picks)
        place = (near_tiles, window_start, low, count, size, own_picks)
        sink_logit = gl.load(sink + block % num_shares * HEADS + head).to(gl.float32) * LOG2_E
        top = sink_logit
        sums = _sum_own(gl.zeros([HEADS, TILE], gl.float32, LOGITS))
        acc = gl.zeros([HEADS, HALF], gl.float32, SUMS)
        mbarrier.wait(q_full, phase)
        phase = 1 - phase
        for pair in range(pairs):
            top, sums, acc = _add_pair(
                q_buffers, k_buffers, p_buffers, tops, q_empty, k_full, k_empty, p_full, top, sums, acc,
                pair, done, place, factor, pair + 1 == pairs, _is_seen, MODE, SIDE,
            )  # fmt: skip
            done += 1
        part = gl.convert_layout(gl.sum(sums, 1), gl.SliceLayout(1, LOGITS))
        totals.index(SIDE).store(part)
        gl.thread_barrier()
        mbarrier.arrive(t_full.index(SIDE), count=1)
        mbarrier.wait(t_full.index(1 - SIDE), 1 - phase)
        total = part + totals.index(1 - SIDE).load(gl.SliceLayout(1, LOGITS)) + gl.exp2(sink_logit - top)
        if SIDE == 0:
            gl.store(lse + own + head, top + gl.log2(total))
        acc = _shrunk(acc, 1.0 / total)
        carrier = k_buffers.index(2 + SIDE)
        carrier.store(acc.to(k_buffers.dtype))
        fence_async_shared()
        gl.thread_barrier()
        tma.async_copy_shared_to_global(out, [own, SIDE * HALF], carrier)
        tma.store_wait(0)
        gl.thread_barrier()
        mbarrier.arrive(k_empty.index(1), count=1)
        block = block - gl.num_programs(0)


@gluon.jit
def _place_of(
    index, window, entries, own_picks, batch, window_start, near_tiles, begin, count, num_window,
    num_entries, MODE: gl.constexpr,
):  # fmt: skip
    """Of tile `index`: where its row of the batch begins, and which rows of that are its keys [TILE]."""
    row = gl.arange(0, TILE, layout=gl.SliceLayout(1, COPIED))
    rows = gl.minimum(gl.maximum(window_start + index * TILE + row, 0), num_window - 1)
    base = window + batch.to(gl.int64) * num_window * WIDTH
    if MODE != NONE:
        is_far = index >= near_tiles
        far = (index - near_tiles) * TILE + row
        if MODE == GATHER:
            far = gl.maximum(gl.load(own_picks + 2 * far, mask=(far < count) & is_far, other=0), 0)
        else:
            far = gl.minimum(gl.maximum(begin + far, 0), num_entries - 1)
        rows = gl.where(is_far, far, rows)
        base = gl.where(is_far, entries + batch.to(gl.int64) * num_entries * WIDTH, base)
    return base, rows


@gluon.jit
def _copy_tiles(
    q_buffers, k_buffers, q_full, q_empty, k_full, k_empty,
    query, window, entries, picks, oldest, first, stop,
    num_queries, num_window, num_entries, num_picks, num_heads, offset, num_blocks, size, MODE: gl.constexpr,
):  # fmt: skip
    """Copies a program's queries and their tiles, each once its buffer is free."""
    c = gl.arange(0, HALF, layout=gl.SliceLayout(0, COPIED))
    num_shares = num_heads // HEADS
    near_tiles = gl.cdiv(size, TILE)
    block = num_blocks - 1 - gl.program_id(0)
    phase, done = 0, 0
    for _ in range(gl.program_id(0), num_blocks, gl.num_programs(0)):
        token, batch = block // num_shares % num_queries, block // num_shares // num_queries
        _, begin, count = bounds_of(block, oldest, first, stop, num_queries, num_picks, num_shares, MODE)
        tiles = near_tiles
        if MODE != NONE:
            tiles += gl.cdiv(count, TILE)
        own_picks = picks + (block // num_shares).to(gl.int64) * (2 * num_picks)
        mbarrier.wait(q_empty, 1 - phase)
        phase = 1 - phase
        mbarrier.expect(q_full, HEADS * WIDTH * 2)
        tma.async_copy_global_to_shared(query, [block * HEADS, 0], q_full, q_buffers.index(0))
        tma.async_copy_global_to_shared(query, [block * HEADS, HALF], q_full, q_buffers.index(1))
        for index in range(gl.cdiv(tiles, 2) * 2):
            base, rows = _place_of(
                index, window, entries, own_picks, batch, token + (offset + 1 - size), near_tiles, begin,
                count, num_window, num_entries, MODE,
            )  # fmt: skip
            slot = index % 2
            mbarrier.wait(k_empty.index(slot), (done + 1) % 2)
            at = base + (rows[:, None] * WIDTH + c[None, :])
            async_copy.async_copy_global_to_shared(k_buffers.index(2 * slot), at)
            async_copy.async_copy_global_to_shared(k_buffers.index(2 * slot + 1), at + HALF)
            async_copy.commit_group()
            async_copy.wait_group(0)
            fence_async_shared()
            gl.thread_barrier()
            mbarrier.arrive(k_full.index(slot), count=1)
            done += slot
        block = block - gl.num_programs(0)


@gluon.jit(do_not_specialize=[*LENGTHS, "num_blocks", "size"])
def _forward(
    query, window, entries, picks, oldest, first, stop, sink, out, lse, scale,
    num_queries, num_window, num_entries, num_picks, num_heads, offset, num_blocks, size,
    MODE: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = query.dtype
    q_buffers = gl.allocate_shared_memory(dtype, [2, HEADS, HALF], out.layout)
    k_buffers = gl.allocate_shared_memory(dtype, [4, TILE, HALF], out.layout)
    p_buffers = gl.allocate_shared_memory(dtype, [2, HEADS, TILE], out.layout)
    tops = gl.allocate_shared_memory(gl.float32, [2, HEADS], LINE)
    totals = gl.allocate_shared_memory(gl.float32, [2, HEADS], LINE)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    p_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    t_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, 1)
    mbarrier.init(q_empty, 2)
    for slot in gl.static_range(2):
        mbarrier.init(k_full.index(slot), 1)
        mbarrier.init(k_empty.index(slot), 2)
        mbarrier.init(p_full.index(slot), 1)
        mbarrier.init(t_full.index(slot), 1)
    fence_async_shared()
    gl.thread_barrier()
    gl.warp_specialize(
        [
            (_attend, (
                q_buffers, k_buffers, p_buffers, tops, totals,
                q_full, q_empty, k_full, k_empty, p_full, t_full,
                picks, oldest, first, stop, sink, out, lse, scale,
                num_queries, num_picks, num_heads, offset, num_blocks, size, MODE, 0,
            )),
            (_attend, (
                q_buffers, k_buffers, p_buffers, tops, totals,
                q_full, q_empty, k_full, k_empty, p_full, t_full,
                picks, oldest, first, stop, sink, out, lse, scale,
                num_queries, num_picks, num_heads, offset, num_blocks, size, MODE, 1,
            )),
            (_copy_tiles, (
                q_buffers, k_buffers, q_full, q_empty, k_full, k_empty,
                query, window, entries, picks, oldest, first, stop,
                num_queries, num_window, num_entries, num_picks, num_heads, offset, num_blocks, size, MODE,
            )),
        ],
        [4, 4], [ODD_REGISTERS, COPY_REGISTERS],
    )  # fmt: skip


def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    """`triton_attention.forward` on Hopper."""
    rows, num_queries, num_heads, _ = problem.query.shape
    out = torch.empty_like(problem.query)
    lse = torch.empty(rows, num_queries, num_heads, dtype=torch.float32, device=out.device)
    num_blocks = rows * num_queries * (num_heads // HEADS.value)
    _forward[(min(num_blocks, chip_of(out).multi_processor_count),)](
        flat(problem.query, HALF.value), *tensors_of(problem), flat(out, HALF.value), lse, problem.scale,
        *problem.lengths, num_blocks, problem.size, MODE=problem.mode, num_warps=4,
    )  # fmt: skip
    return out, lse
