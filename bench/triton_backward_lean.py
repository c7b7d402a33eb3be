"""A candidate for triton_attention_backward_gluon.py, which says how it works (Gluon, Hopper).

What differs: Q and dO are released and copied 64 channels at a time, O is read earlier, and an index of zero
that the compiler cannot see keeps the products' addresses out of registers: 41 reloads instead of 140 in the
eight warps' code. Compiled for sm_90a and right in emulation; never timed.
"""

from __future__ import annotations

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
from triton_key_sums_lean import add_tiles

from consilience.model.kernels.attention_problem import Problem
from consilience.model.kernels.triton_attention_backward_gluon import ADDER_REGISTERS, backward_by
from consilience.model.kernels.triton_attention_gluon import (
    COPIED,
    GATHER,
    HEADS,
    LENGTHS,
    LOG2_E,
    LOGITS,
    NONE,
    SHARED,
    SUMS,
    TILE,
    WIDTH,
    _copy_keys,
    _seen,
    flat,
)
from consilience.model.kernels.triton_key_sums_gluon import ADDER_WARPS, CHUNK, block_of

SQUARE = gl.constexpr(SHARED)
PARTS = gl.constexpr(WIDTH.value // CHUNK.value)


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
def _is_seen(index, near_tiles, window_start, low, count, size, own_picks, MODE: gl.constexpr):
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
    low, begin, count = _seen(block, oldest, first, stop, num_queries, num_picks, num_shares, MODE)
    for part_index in range(PARTS):
        _copy_part(queries, grads, query, grad, block, is_loaded, part_index)
    output = _load_out(out, block)
    rows = gl.minimum(gl.maximum(token + (offset + 1 - size) + row, 0), num_window - 1)
    _copy_keys(whole.index(2), window, entries, rows, False, batch, num_window, num_entries)
    phase, done = 0, 0
    for turn in range(gl.program_id(0), num_indices, gl.num_programs(0)):
        following = block_of(
            gl.minimum(turn + gl.num_programs(0), num_indices - 1),
            oldest, first, stop, num_queries, num_shares, offset, first_block, end_block,
            MODE, MEASURES, COPIED,
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
        bottom = gl.load(lse + own + head)
        sinks = gl.load(sink + block % num_shares * HEADS + head).to(gl.float32) * LOG2_E
        mbarrier.wait(is_loaded, phase)
        delta = gl.sum(output.to(gl.float32) * whole.index(1).load(COPIED).to(gl.float32), 1)
        delta = gl.convert_layout(delta, gl.SliceLayout(1, LOGITS))
        if not MEASURES:
            gl.store(d_sink + own + head, -delta * gl.exp2(sinks - bottom))
        acc = gl.zeros([HEADS, WIDTH], gl.float32, SUMS)
        for index in range(tiles):
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
            seen = _is_seen(index, near_tiles, window_start, low, count, size, own_picks, MODE)
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
            _copy_keys(
                keys, window, entries, rows, far_ahead, gl.where(index + 1 == tiles, next_batch, batch),
                num_window, num_entries,
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


def backward(
    problem: Problem, out: Tensor, lse: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """The chosen kernel's function by this one."""
    copies = tuple(flat(x, CHUNK.value) for x in (problem.query, grad.contiguous()))
    return backward_by(_backward, copies, problem, out, lse)
