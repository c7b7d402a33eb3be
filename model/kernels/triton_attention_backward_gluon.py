"""Attention's backward in one launch (Gluon, Hopper); the same function as triton_attention_backward.py's.

A program stays on its SM and takes query after query of 64 heads × 512 channels. A tile of 64 keys gives
logits, dP, dQ's part and the tile's own gradients; these are added where they belong in L2, so nothing of
[queries, keys] and no row of a pick passes through memory. Additions in any order give the same bits because
they are additions of integers: a gradient times a power of two, rounded; two of 31 bits ride in one of 64.

    tile      S = Q Kᵀ, dP = dO Kᵀ | P, dS to shared memory | dQ += dS K | the next tile is copied
              over K | four times: 128 channels of Pᵀ dO + dSᵀ Q, added
    scale     from the largest parts of one query in 32; the run finds the largest of all, and where a sum
              could have been too large, makes the sums again with a scale from that

B rows, T queries, H heads, S window keys, M entries, K picks of a query, W window.
Shared memory: Q, dO and keys 64 KiB each, P and dS 8 each. Registers of 256 threads: dQ takes 128, S and dP
32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from consilience.model.kernels.attention_problem import Problem
from consilience.model.kernels.triton_attention_gluon import (
    COPIED,
    GATHER,
    HEADS,
    LENGTHS,
    LOG2_E,
    LOGITS,
    NONE,
    SUMS,
    TILE,
    WARPS,
    WIDTH,
    _copy_keys,
    _copy_query,
    _seen,
    chip_of,
    flat,
    tensors_of,
)
from consilience.model.kernels.triton_integer_sums import choose, clear, unpack

CHUNK = gl.constexpr(128)  # channels of a tile's gradients at a time
PART = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 64, 16]))
SQUARE = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
# Pairs of channels as they are added: eight lanes cover 64 bytes of a row.
ADDED = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[8, 0], [1, 0], [0, 8], [0, 16]],
        lane_bases=[[0, 1], [0, 2], [0, 4], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0], [0, 32]],
        block_bases=[],
        shape=[64, 64],
    )
)
ROOM = 64.0, 16.0  # how much larger parts of keys, and of entries, may be than the largest measured
RANGE = 32768  # blocks whose sums are made at once
WINDOW = gl.constexpr(32)  # blocks of which one is measured


@gluon.jit
def _largest(part):
    """[TILE, 8]: largest |part| over the columns that a thread holds, which needs no other thread."""
    groups = gl.abs(part).reshape([TILE, 2, 8, 4, 2])
    return gl.max(gl.max(groups, 4), 2).reshape([TILE, 8])


@gluon.jit
def _multiply(p_buffer, s_buffer, g_buffer, q_buffer, CHUNK_INDEX: gl.constexpr):
    """Pᵀ dO + dSᵀ Q of a chunk of channels, begun."""
    begin: gl.constexpr = CHUNK_INDEX * CHUNK
    part = warpgroup_mma(
        p_buffer.permute([1, 0]), g_buffer.slice(begin, CHUNK, 1),
        gl.zeros([TILE, CHUNK], gl.float32, PART), use_acc=False, is_async=True,
    )  # fmt: skip
    return warpgroup_mma(s_buffer.permute([1, 0]), q_buffer.slice(begin, CHUNK, 1), part, is_async=True)


@gluon.jit
def _add(part, target, rows, is_there, scale, chunk):
    """Add part [TILE, CHUNK] · scale, as integers, to channels of rows of the target."""
    pairs = part.reshape([TILE, CHUNK // 2, 2])
    low, high = gl.split(pairs)
    low, high = low * scale, high * scale
    low = gl.where(low < 0, low - 0.5, low + 0.5).to(gl.int32)
    high = gl.where(high < 0, high - 0.5, high + 0.5).to(gl.int32)
    both = (high.to(gl.int64) << 32) + low.to(gl.int64)
    both = gl.convert_layout(both, ADDED)
    column = gl.arange(0, CHUNK // 2, layout=gl.SliceLayout(0, ADDED)) + chunk * (CHUNK // 2)
    gl.atomic_add(
        target + ((rows * (WIDTH // 2))[:, None] + column[None, :]), both,
        mask=is_there[:, None], sem="relaxed",
    )  # fmt: skip


@gluon.jit
def _block(
    index, oldest, first, stop, num_queries, num_shares, offset, first_block, end_block,
    MODE: gl.constexpr, MEASURES: gl.constexpr,
):  # fmt: skip
    """The block that is a program's `index`-th: the last first, as they see more.

    Measuring, one of every WINDOW: in turns the one that sees the fewest keys, and the one that sees the
    fewest entries, since the fewer there are the larger are their weights.
    """
    block = end_block - 1 - index
    if MEASURES:
        group = first_block + index * WINDOW + gl.arange(0, WINDOW, layout=gl.SliceLayout(0, COPIED))
        is_there = group < end_block
        at = gl.where(is_there, group, first_block) // num_shares
        seen = at % num_queries + offset + 1 - gl.load(oldest + at)
        if MODE != NONE:
            far = gl.load(stop + at) - gl.load(first + at)
            seen = gl.where((index % 2 == 1) & (far > 0), far, seen + num_queries)
        seen = gl.where(is_there, seen, 2147483647)
        block = gl.min(gl.where(seen == gl.min(seen, 0), group, end_block - 1), 0)
    return block


@gluon.jit(do_not_specialize=[*LENGTHS, "size", "first_block", "end_block", "num_indices"])
def _backward(
    query, window, entries, picks, oldest, first, stop, sink, grad, out, lse, d_query, d_sink,
    near_sums, far_sums, scales, largest, is_needed, scale,
    num_queries, num_window, num_entries, num_picks, num_heads, offset, size,
    first_block, end_block, num_indices,
    MODE: gl.constexpr, MEASURES: gl.constexpr,
):  # fmt: skip
    if gl.load(is_needed) == 0:
        return
    q_buffer = gl.allocate_shared_memory(query.dtype, [HEADS, WIDTH], query.layout)
    g_buffer = gl.allocate_shared_memory(query.dtype, [HEADS, WIDTH], query.layout)
    keys = gl.allocate_shared_memory(query.dtype, [TILE, WIDTH], query.layout)
    p_buffer = gl.allocate_shared_memory(query.dtype, [HEADS, TILE], SQUARE)
    s_buffer = gl.allocate_shared_memory(query.dtype, [HEADS, TILE], SQUARE)
    is_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(is_full, 2)
    fence_async_shared()
    row = gl.arange(0, TILE, layout=gl.SliceLayout(1, COPIED))
    r = gl.arange(0, HEADS, layout=gl.SliceLayout(1, COPIED))
    c = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, COPIED))
    column = gl.arange(0, TILE, layout=gl.SliceLayout(0, LOGITS))
    head = gl.arange(0, HEADS, layout=gl.SliceLayout(1, LOGITS))
    head_of_sum = gl.arange(0, HEADS, layout=gl.SliceLayout(1, SUMS))
    channel = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, SUMS))
    added = gl.arange(0, TILE, layout=gl.SliceLayout(1, ADDED))
    num_shares = num_heads // HEADS
    near_tiles = gl.cdiv(size, TILE)
    factor = scale * LOG2_E
    near_scale, far_scale = gl.load(scales), gl.load(scales + 1)
    near_top = _largest(gl.zeros([TILE, CHUNK], gl.float32, PART))
    far_top = near_top

    block = _block(
        gl.program_id(0),
        oldest,
        first,
        stop,
        num_queries,
        num_shares,
        offset,
        first_block,
        end_block,
        MODE,
        MEASURES,
    )
    token, batch = block // num_shares % num_queries, block // num_shares // num_queries
    low, begin, count = _seen(block, oldest, first, stop, num_queries, num_picks, num_shares, MODE)
    _copy_query(q_buffer, query, block, is_full)
    _copy_query(g_buffer, grad, block, is_full)
    rows = gl.minimum(gl.maximum(token + (offset + 1 - size) + row, 0), num_window - 1)
    _copy_keys(keys, window, entries, rows, False, batch, num_window, num_entries)
    phase = 0
    for turn in range(gl.program_id(0), num_indices, gl.num_programs(0)):
        following = _block(
            gl.minimum(turn + gl.num_programs(0), num_indices - 1),
            oldest, first, stop, num_queries, num_shares, offset, first_block, end_block, MODE, MEASURES,
        )  # fmt: skip
        next_token = following // num_shares % num_queries
        next_batch = following // num_shares // num_queries
        next_low, next_begin, next_count = _seen(
            following, oldest, first, stop, num_queries, num_picks, num_shares, MODE
        )
        tiles = near_tiles
        if MODE != NONE:
            tiles += gl.cdiv(count, TILE)
        own = block.to(gl.int64) * HEADS
        window_start = token + (offset + 1 - size)
        next_start = next_token + (offset + 1 - size)
        own_picks = picks + (block // num_shares).to(gl.int64) * (2 * num_picks)
        output = gl.load(out + own * WIDTH + (r[:, None] * WIDTH + c[None, :]))
        bottom = gl.load(lse + own + head)
        sinks = gl.load(sink + block % num_shares * HEADS + head).to(gl.float32) * LOG2_E
        mbarrier.wait(is_full, phase)
        phase = 1 - phase
        delta = gl.sum(output.to(gl.float32) * g_buffer.load(COPIED).to(gl.float32), 1)
        delta = gl.convert_layout(delta, gl.SliceLayout(1, LOGITS))
        if not MEASURES:
            gl.store(d_sink + own + head, -delta * gl.exp2(sinks - bottom))
        acc = gl.zeros([HEADS, WIDTH], gl.float32, SUMS)
        for index in range(tiles):
            async_copy.wait_group(0)
            fence_async_shared()
            gl.thread_barrier()
            logits = warpgroup_mma(
                q_buffer, keys.permute([1, 0]), gl.zeros([HEADS, TILE], gl.float32, LOGITS),
                use_acc=False, is_async=True,
            )  # fmt: skip
            d_p = warpgroup_mma(
                g_buffer, keys.permute([1, 0]), gl.zeros([HEADS, TILE], gl.float32, LOGITS),
                use_acc=False, is_async=True,
            )  # fmt: skip
            is_far = index >= near_tiles
            # What is seen, and where its gradients go.
            place = gl.where(is_far, (index - near_tiles) * TILE, index * TILE) + column
            seen = (window_start + place >= low) & (place < size)
            if MODE != NONE:
                seen_far = place < count
                if MODE == GATHER:
                    seen_far = gl.load(own_picks + 2 * place, mask=seen_far & is_far, other=-1) >= 0
                seen = (seen & (index < near_tiles)) | (seen_far & is_far)
            # Rows of the tile after this one.
            ahead = index + 1
            is_next = ahead >= tiles
            start = gl.where(is_next, next_start - tiles * TILE, window_start) + ahead * TILE
            rows = gl.minimum(gl.maximum(start + row, 0), num_window - 1)
            far_ahead = (ahead >= near_tiles) & (ahead < tiles)
            if MODE != NONE:
                far = (ahead - near_tiles) * TILE + row
                if MODE == GATHER:
                    far = gl.maximum(gl.load(own_picks + 2 * far, mask=(far < count) & far_ahead, other=0), 0)
                else:
                    far = gl.minimum(begin + far, num_entries - 1)
                rows = gl.where(far_ahead, far, rows)
            logits = warpgroup_mma_wait(1, deps=(logits,))
            p = gl.where(seen[None, :], gl.exp2(logits * factor - bottom[:, None]), 0.0)
            p_buffer.store(p.to(query.dtype))
            d_p = warpgroup_mma_wait(0, deps=(d_p,))
            d_s = p * (d_p - delta[:, None]) * scale
            s_buffer.store(d_s.to(query.dtype))
            fence_async_shared()
            gl.thread_barrier()
            goal = gl.where(is_far, (index - near_tiles) * TILE, index * TILE) + added
            goes = (window_start + goal >= low) & (goal < size)
            target_row = gl.maximum(window_start + goal, 0)
            if MODE != NONE:
                goes_far = goal < count
                far_row = begin + goal
                if MODE == GATHER:
                    far_row = gl.load(own_picks + 2 * goal, mask=goes_far & is_far, other=-1)
                    goes_far = far_row >= 0
                goes = (goes & (index < near_tiles)) | (goes_far & is_far)
                target_row = gl.where(is_far, far_row, target_row)
            acc = warpgroup_mma(s_buffer, keys, acc, is_async=True)
            part = _multiply(p_buffer, s_buffer, g_buffer, q_buffer, 0)
            acc, part = warpgroup_mma_wait(0, deps=(acc, part))
            gl.thread_barrier()
            _copy_keys(
                keys, window, entries, rows, far_ahead, gl.where(is_next, next_batch, batch),
                num_window, num_entries,
            )  # fmt: skip
            sums = near_sums + batch.to(gl.int64) * num_window * (WIDTH // 2)
            factor_of = near_scale
            if MODE != NONE:
                far_sums_of = far_sums + batch.to(gl.int64) * num_entries * (WIDTH // 2)
                sums = gl.where(is_far, far_sums_of, sums)
                factor_of = gl.where(is_far, far_scale, near_scale)
            top = _largest(part)
            for chunk in gl.static_range(1, WIDTH // CHUNK):
                if not MEASURES:
                    _add(part, sums, target_row, goes, factor_of, chunk - 1)
                part = _multiply(p_buffer, s_buffer, g_buffer, q_buffer, chunk)
                part = warpgroup_mma_wait(0, deps=(part,))
                top = gl.maximum(top, _largest(part))
            if not MEASURES:
                _add(part, sums, target_row, goes, factor_of, WIDTH // CHUNK - 1)
            far_top = gl.where(is_far, gl.maximum(far_top, top), far_top)
            near_top = gl.where(is_far, near_top, gl.maximum(near_top, top))
        gl.thread_barrier()
        _copy_query(q_buffer, query, following, is_full)
        _copy_query(g_buffer, grad, following, is_full)
        if not MEASURES:
            gl.store(
                d_query + own * WIDTH + (head_of_sum[:, None] * WIDTH + channel[None, :]), acc.to(query.dtype)
            )
        block, token, batch = following, next_token, next_batch
        low, begin, count = next_low, next_begin, next_count
    mbarrier.wait(is_full, phase)
    async_copy.wait_group(0)
    gl.atomic_max(largest, gl.max(gl.max(near_top, 1), 0).to(gl.int32, bitcast=True), sem="relaxed")
    gl.atomic_max(largest + 1, gl.max(gl.max(far_top, 1), 0).to(gl.int32, bitcast=True), sem="relaxed")


def _add_range(problem: Problem, given: tuple[Any, ...], found: list[Tensor], begin: int, end: int) -> None:
    """Gradients of keys from the blocks begin … end - 1, added to `found` (fp32), the first put there."""
    device, shares = problem.query.device, problem.query.shape[2] // HEADS.value
    programs = chip_of(problem.query).multi_processor_count
    sums = [x.new_zeros(*x.shape[:2], WIDTH.value // 2, dtype=torch.int64) for x in found]
    scales, largest = torch.ones(2, device=device), torch.zeros(2, 2, dtype=torch.int32, device=device)
    is_needed = torch.ones(2, dtype=torch.int32, device=device)
    # A key's channel gets at most so many integers, none above its limit: their sum fits 31 bits.
    most = problem.size * shares, min(problem.query.shape[1] * shares, end - begin)
    limits = [float((2**31 - 1) // num - 1) for num in most]

    def launch(largest: Tensor, is_needed: Tensor, num_indices: int, measures: bool) -> None:
        _backward[(min(num_indices, programs),)](
            *given, sums[0], sums[-1], scales, largest, is_needed, problem.scale, *problem.lengths,
            problem.size, begin, end, num_indices, MODE=problem.mode, MEASURES=measures, num_warps=WARPS,
        )  # fmt: skip

    launch(largest[0], is_needed, triton.cdiv(end - begin, WINDOW.value), True)
    choose[(1,)](largest[0], scales, is_needed, *limits, *ROOM, IS_CHECK=False)
    launch(largest[1], is_needed, end - begin, False)
    choose[(1,)](largest[1], scales, is_needed[1:], *limits, *ROOM, IS_CHECK=True)
    for pairs in sums:
        clear[(triton.cdiv(pairs.numel(), 4096),)](pairs, pairs.numel(), is_needed[1:], BLOCK=4096)
    launch(largest[1], is_needed[1:], end - begin, False)
    for index, (x, pairs) in enumerate(zip(found, sums)):
        unpack[(triton.cdiv(pairs.numel(), 1024),)](
            pairs, scales, largest[1], x, pairs.numel(),
            INDEX=index, ADDS=begin > 0, BLOCK=1024,
        )  # fmt: skip


def backward(
    problem: Problem, out: Tensor, lse: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """`triton_attention_backward.backward` on Hopper; queries beyond RANGE blocks go in several ranges, so
    that integers keep bits enough."""
    query = problem.query
    num_blocks = query.shape[0] * query.shape[1] * (query.shape[2] // HEADS.value)
    d_query, d_sink = torch.empty_like(query), torch.empty_like(lse)
    keys = [problem.window] + ([problem.entries] if problem.entries is not None else [])
    found = [torch.empty_like(x, dtype=torch.float32) for x in keys]
    given = (*tensors_of(problem), flat(grad.contiguous()), out, lse, d_query, d_sink)
    for begin in range(0, num_blocks, RANGE):
        _add_range(problem, given, found, begin, min(begin + RANGE, num_blocks))
    found = [x.to(query.dtype) for x in found]
    d_entries = found[1] if problem.entries is not None else None
    return d_query, found[0], d_entries, d_sink.sum((0, 1)).to(problem.sink.dtype)
