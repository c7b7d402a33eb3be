"""Attention's backward in one launch (Gluon, Hopper); the same function as triton_attention_backward.py's.

A program stays on its SM and takes query after query of 64 heads × 512 channels, in two partitions: eight
warps make a tile's P and dS and sum dQ; four more (triton_key_sums_gluon.py) multiply the tile's own
gradients from these and add them where they belong in L2, so nothing of [queries, keys] and no row of a pick
passes through memory. P and dS lie in two buffers: additions of a tile run beside the products of the next.

    eight warps   S = Q Kᵀ, dP = dO Kᵀ | P, dS to shared memory | dQ += dS K | the next tile is copied over K
    four warps    eight times: 64 channels of Pᵀ dO + dSᵀ Q, added; then Q and dO may be overwritten
    scale         from the largest parts of one query in 32; the run finds the largest of all, and where a sum
                  could have been too large, makes the sums again with a scale from that

B rows, T queries, H heads, S window keys, M entries, K picks of a query, W window.
Shared memory: Q, dO and keys 64 KiB each, P and dS 2 × 8 each. Registers: dQ takes 128 of a thread of the
eight warps, S and dP 32; the four have 88.
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
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from consilience.model.kernels.attention_problem import Problem
from consilience.model.kernels.triton_attention_parts_gluon import (
    COPIED,
    GATHER,
    HEADS,
    LENGTHS,
    LOG2_E,
    NONE,
    SHARED,
    TILE,
    WARPS,
    WIDTH,
    bounds_of,
    chip_of,
    copy_keys,
    flat,
    tensors_of,
)
from consilience.model.kernels.triton_integer_sums import choose, clear, unpack
from consilience.model.kernels.triton_key_sums_gluon import ADDER_WARPS, CHUNK, WINDOW, add_tiles, block_of

# Two warp groups of 64 rows: each half of the tile's keys, and half of the channels.
LOGITS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 32, 16]))
SUMS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 256, 16]))
SQUARE = gl.constexpr(SHARED)
PARTS = gl.constexpr(WIDTH.value // CHUNK.value)
ADDER_REGISTERS = gl.constexpr(88)  # of a thread
ROOM = 64.0, 16.0  # how much larger parts of keys, and of entries, may be than the largest measured
RANGE = 32768  # blocks whose sums are made at once


@gluon.jit
def _copy_part(queries, grads, query, grad, block, is_loaded, part_index):
    """64 channels of a block's Q and dO."""
    mbarrier.expect(is_loaded, 2 * HEADS * CHUNK * 2)
    at = part_index * CHUNK
    tma.async_copy_global_to_shared(query, [block * HEADS, at], is_loaded, queries.index(part_index))
    tma.async_copy_global_to_shared(grad, [block * HEADS, at], is_loaded, grads.index(part_index))


@gluon.jit
def _load_out(out, block):
    row = gl.arange(0, HEADS, layout=gl.SliceLayout(1, COPIED))
    channel = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, COPIED))
    return gl.load(out + block.to(gl.int64) * HEADS * WIDTH + (row[:, None] * WIDTH + channel[None, :]))


@gluon.jit
def _isbounds_of(index, near_tiles, window_start, low, count, size, own_picks, MODE: gl.constexpr):
    """Which keys of tile `index` its query sees."""
    is_far = index >= near_tiles
    slot = gl.where(is_far, index - near_tiles, index) * TILE + gl.arange(
        0, TILE, layout=gl.SliceLayout(0, LOGITS)
    )
    seen = (window_start + slot >= low) & (slot < size)
    if MODE != NONE:
        seen_far = slot < count
        if MODE == GATHER:
            seen_far = gl.load(own_picks + 2 * slot, mask=seen_far & is_far, other=-1) >= 0
        seen = (seen & (index < near_tiles)) | (seen_far & is_far)
    return seen


@gluon.jit
def _rows_after(
    index, tiles, near_tiles, window_start, next_start, begin, count, own_picks, num_window, num_entries,
    MODE: gl.constexpr,
):  # fmt: skip
    """Rows of the keys of the tile after `index`, the next query's first behind the last; whether entries."""
    row = gl.arange(0, TILE, layout=gl.SliceLayout(1, COPIED))
    ahead = index + 1
    start = gl.where(ahead >= tiles, next_start - tiles * TILE, window_start) + ahead * TILE
    rows = gl.minimum(gl.maximum(start + row, 0), num_window - 1)
    is_far = (ahead >= near_tiles) & (ahead < tiles)
    if MODE != NONE:
        far = (ahead - near_tiles) * TILE + row
        if MODE == GATHER:
            far = gl.maximum(gl.load(own_picks + 2 * far, mask=(far < count) & is_far, other=0), 0)
        else:
            far = gl.minimum(begin + far, num_entries - 1)
        rows = gl.where(is_far, far, rows)
    return rows, is_far


@gluon.jit
def _add_tile(
    whole, p_buffers, s_buffers, is_full, is_empty, window, entries, own_picks, acc, bottom, delta,
    index, done, tiles, near_tiles, window_start, next_start, low, begin, count, size, batch, next_batch,
    num_window, num_entries, factor, scale, MODE: gl.constexpr,
):  # fmt: skip
    """A tile's P and dS, for the adder; dQ with what it adds. The next tile is copied over its keys."""
    async_copy.wait_group(0)
    fence_async_shared()
    gl.thread_barrier()
    # Zero, though the compiler cannot see it: it would keep every product's addresses in registers.
    zero = done >> 31
    q_buffer, g_buffer, keys = whole.index(zero), whole.index(zero + 1), whole.index(zero + 2)
    logits = warpgroup_mma(
        q_buffer, keys.permute([1, 0]), gl.zeros([HEADS, TILE], gl.float32, LOGITS),
        use_acc=False, is_async=True,
    )  # fmt: skip
    d_p = warpgroup_mma(
        g_buffer, keys.permute([1, 0]), gl.zeros([HEADS, TILE], gl.float32, LOGITS),
        use_acc=False, is_async=True,
    )  # fmt: skip
    seen = _isbounds_of(index, near_tiles, window_start, low, count, size, own_picks, MODE)
    rows, far_ahead = _rows_after(
        index, tiles, near_tiles, window_start, next_start, begin, count, own_picks,
        num_window, num_entries, MODE,
    )  # fmt: skip
    slot = done % 2
    p_buffer, s_buffer = p_buffers.index(slot), s_buffers.index(slot)
    logits = warpgroup_mma_wait(1, deps=(logits,))
    p = gl.where(seen[None, :], gl.exp2(logits * factor - bottom[:, None]), 0.0)
    mbarrier.wait(is_empty.index(slot), (done // 2 + 1) % 2)
    p_buffer.store(p.to(whole.dtype))
    d_p = warpgroup_mma_wait(0, deps=(d_p,))
    d_s = p * (d_p - delta[:, None]) * scale
    s_buffer.store(d_s.to(whole.dtype))
    fence_async_shared()
    gl.thread_barrier()
    mbarrier.arrive(is_full.index(slot), count=1)
    acc = warpgroup_mma(s_buffer, keys, acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    gl.thread_barrier()
    copy_keys(
        keys, window, entries, rows, far_ahead, gl.where(index + 1 == tiles, next_batch, batch),
        num_window, num_entries,
    )  # fmt: skip
    return acc


@gluon.jit
def _make_weights(
    queries, grads, whole, p_buffers, s_buffers, is_loaded, is_full, is_empty, is_released,
    query, window, entries, picks, oldest, first, stop, sink, grad, out, lse, d_query, d_sink, scale,
    num_queries, num_window, num_entries, num_picks, num_heads, offset, size,
    first_block, end_block, num_indices,
    MODE: gl.constexpr, MEASURES: gl.constexpr,
):  # fmt: skip
    """P and dS of all tiles of a program's queries, for the adder; writes dQ and the sink's parts."""
    row = gl.arange(0, TILE, layout=gl.SliceLayout(1, COPIED))
    head = gl.arange(0, HEADS, layout=gl.SliceLayout(1, LOGITS))
    head_of_sum = gl.arange(0, HEADS, layout=gl.SliceLayout(1, SUMS))
    channel = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, SUMS))
    num_shares = num_heads // HEADS
    near_tiles = gl.cdiv(size, TILE)
    factor = scale * LOG2_E
    block = block_of(
        gl.program_id(0), oldest, first, stop, num_queries, num_shares, offset, first_block, end_block,
        MODE, MEASURES, COPIED,
    )  # fmt: skip
    token, batch = block // num_shares % num_queries, block // num_shares // num_queries
    low, begin, count = bounds_of(block, oldest, first, stop, num_queries, num_picks, num_shares, MODE)
    for part_index in range(PARTS):
        _copy_part(queries, grads, query, grad, block, is_loaded, part_index)
    output = _load_out(out, block)
    rows = gl.minimum(gl.maximum(token + (offset + 1 - size) + row, 0), num_window - 1)
    copy_keys(whole.index(2), window, entries, rows, False, batch, num_window, num_entries)
    phase, done = 0, 0
    for turn in range(gl.program_id(0), num_indices, gl.num_programs(0)):
        following = block_of(
            gl.minimum(turn + gl.num_programs(0), num_indices - 1),
            oldest, first, stop, num_queries, num_shares, offset, first_block, end_block,
            MODE, MEASURES, COPIED,
        )  # fmt: skip
        next_token = following // num_shares % num_queries
        next_batch = following // num_shares // num_queries
        next_low, next_begin, next_count = bounds_of(
            following, oldest, first, stop, num_queries, num_picks, num_shares, MODE
        )
        tiles = near_tiles
        if MODE != NONE:
            tiles += gl.cdiv(count, TILE)
        own = block.to(gl.int64) * HEADS
        window_start = token + (offset + 1 - size)
        next_start = next_token + (offset + 1 - size)
        own_picks = picks + (block // num_shares).to(gl.int64) * (2 * num_picks)
        bottom = gl.load(lse + own + head)
        sinks = gl.load(sink + block % num_shares * HEADS + head).to(gl.float32) * LOG2_E
        mbarrier.wait(is_loaded, phase)
        delta = gl.sum(output.to(gl.float32) * whole.index(1).load(COPIED).to(gl.float32), 1)
        delta = gl.convert_layout(delta, gl.SliceLayout(1, LOGITS))
        if not MEASURES:
            gl.store(d_sink + own + head, -delta * gl.exp2(sinks - bottom))
        acc = gl.zeros([HEADS, WIDTH], gl.float32, SUMS)
        for index in range(tiles):
            acc = _add_tile(
                whole, p_buffers, s_buffers, is_full, is_empty, window, entries, own_picks, acc, bottom,
                delta, index, done, tiles, near_tiles, window_start, next_start, low, begin, count, size,
                batch, next_batch, num_window, num_entries, factor, scale, MODE,
            )  # fmt: skip
            done += 1
        if not MEASURES:
            at = own * WIDTH + (head_of_sum[:, None] * WIDTH + channel[None, :])
            gl.store(d_query + at, acc.to(whole.dtype))
        output = _load_out(out, following)
        for part_index in range(PARTS):
            mbarrier.wait(is_released.index(part_index), phase)
            _copy_part(queries, grads, query, grad, following, is_loaded, part_index)
        phase = 1 - phase
        block, token, batch = following, next_token, next_batch
        low, begin, count = next_low, next_begin, next_count
    mbarrier.wait(is_loaded, phase)
    async_copy.wait_group(0)


@gluon.jit(do_not_specialize=[*LENGTHS, "size", "first_block", "end_block", "num_indices"])
def _backward(
    query, window, entries, picks, oldest, first, stop, sink, grad, out, lse, d_query, d_sink,
    near_sums, far_sums, scales, largest, is_needed, scale,
    num_queries, num_window, num_entries, num_picks, num_heads, offset, size,
    first_block, end_block, num_indices,
    MODE: gl.constexpr, MEASURES: gl.constexpr,
):  # fmt: skip
    num_indices = gl.where(gl.load(is_needed) == 0, 0, num_indices)
    whole = gl.allocate_shared_memory(query.dtype, [3, HEADS, WIDTH], SQUARE)
    queries = whole.index(0)._reinterpret(query.dtype, [PARTS, HEADS, CHUNK], SQUARE)
    grads = whole.index(1)._reinterpret(query.dtype, [PARTS, HEADS, CHUNK], SQUARE)
    p_buffers = gl.allocate_shared_memory(query.dtype, [2, HEADS, TILE], SQUARE)
    s_buffers = gl.allocate_shared_memory(query.dtype, [2, HEADS, TILE], SQUARE)
    is_loaded = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    is_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    is_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    is_released = gl.allocate_shared_memory(gl.int64, [PARTS, 1], mbarrier.MBarrierLayout())
    mbarrier.init(is_loaded, PARTS)
    for part_index in gl.static_range(PARTS):
        mbarrier.init(is_released.index(part_index), 1)
    for slot in gl.static_range(2):
        mbarrier.init(is_full.index(slot), 1)
        mbarrier.init(is_empty.index(slot), 1)
    fence_async_shared()
    gl.thread_barrier()
    gl.warp_specialize(
        [
            (_make_weights, (
                queries, grads, whole, p_buffers, s_buffers,
                is_loaded, is_full, is_empty, is_released,
                query, window, entries, picks, oldest, first, stop, sink, grad, out, lse, d_query, d_sink,
                scale,
                num_queries, num_window, num_entries, num_picks, num_heads, offset, size,
                first_block, end_block, num_indices, MODE, MEASURES,
            )),
            (add_tiles, (
                queries, grads, p_buffers, s_buffers, is_loaded, is_full, is_empty, is_released,
                picks, oldest, first, stop, near_sums, far_sums, scales, largest,
                num_queries, num_window, num_entries, num_picks, num_heads, offset, size,
                first_block, end_block, num_indices, MODE, MEASURES,
            )),
        ],
        [ADDER_WARPS], [ADDER_REGISTERS],
    )  # fmt: skip


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
    copies = [flat(x, CHUNK.value) for x in (query, grad.contiguous())]
    given = (copies[0], *tensors_of(problem), copies[1], out, lse, d_query, d_sink)
    for begin in range(0, num_blocks, RANGE):
        _add_range(problem, given, found, begin, min(begin + RANGE, num_blocks))
    found = [x.to(query.dtype) for x in found]
    d_entries = found[1] if problem.entries is not None else None
    return d_query, found[0], d_entries, d_sink.sum((0, 1)).to(problem.sink.dtype)
