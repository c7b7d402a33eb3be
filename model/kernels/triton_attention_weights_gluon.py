"""Weights of attention's backward by hand-placed copies (Gluon, Hopper); twin: `_weights` of
triton_attention_backward.py.

A program stays on its SM and takes query after query of 64 heads × 512 channels. Queries and upstream
gradients lie in registers, eight rows of one, eight of the other, so that one product of 128 rows with a tile
of keys gives logits and dP, and a thread holds both of a pair. Shared memory is left to the keys: a ring of
four tiles of 32, each copied again as soon as its product has ended, behind a query's last tile with the next
query's.

    start of a query    Q waits in `staging`; dO takes its place, O is read meanwhile; then the next query's Q
    two tiles           wait for them | issue both products | wait for the first | copy the tile four further
                        | its P and dS | the same of the second

Picked entries take triton_attention_backward_gluon.py instead.

B rows, T queries, H heads, S window keys, M entries, W window.
Shared memory: staging 64 KiB, keys 4 × 32. Registers of 256 threads: Q and dO take 128, two products 32.
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

from consilience.model.kernels.attention_problem import Problem
from consilience.model.kernels.triton_attention_parts_gluon import (
    COPIED,
    HEADS,
    LENGTHS,
    LOG2_E,
    NONE,
    WARPS,
    WIDTH,
    bounds_of,
    chip_of,
    copy_keys,
    flat,
    tensors_of,
)

TILE, RING = gl.constexpr(32), gl.constexpr(4)
# Rows of Q (or dO) as the left operand of a product whose other rows, 8 further each, are dO's (or Q's).
HALF = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 8], [0, 16], [0, 32], [0, 64], [0, 128], [0, 256]],
        lane_bases=[[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[8, 0], [16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 512],
    )
)
# Logits and dP of a thread: one head, pairs of keys.
PAIRED = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 8], [0, 16]],
        lane_bases=[[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[8, 0], [16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 32],
    )
)
PRODUCT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, 32, 16]))
LEFT = gl.constexpr(gl.DotOperandLayout(0, PRODUCT.value, 2))
# [key, P or dS, head]: a warp writes two keys' 256 bytes.
STORED = gl.constexpr(gl.BlockedLayout([1, 1, 8], [2, 2, 8], [WARPS, 1, 1], [2, 1, 0]))


@gluon.jit
def _copy_query(buffer, query, block, is_full):
    mbarrier.expect(is_full, HEADS * WIDTH * 2)
    tma.async_copy_global_to_shared(query, [block * HEADS, 0], is_full, buffer)


@gluon.jit
def _stack(q, d):
    """[128, 512] as a left operand: 8 rows of q, 8 of d, the next 8 of q …"""
    both = gl.join(q, d).reshape([8, 8, WIDTH, 2]).permute([0, 3, 1, 2])
    return gl.convert_layout(both.reshape([2 * HEADS, WIDTH]), LEFT)


@gluon.jit
def _multiply(stacked, buffer):
    return warpgroup_mma(
        stacked, buffer.permute([1, 0]), gl.zeros([2 * HEADS, TILE], gl.float32, PRODUCT),
        use_acc=False, is_async=True,
    )  # fmt: skip


@gluon.jit
def _store(
    product, index, bottom, delta, near, far, low, count, window_start, near_tiles, num_far, size,
    factor, scale, padded, MODE: gl.constexpr,
):  # fmt: skip
    """P and scale · dS of tile `index` from its product [128, TILE]."""
    halves = product.reshape([8, 2, 8, TILE]).permute([0, 2, 3, 1])
    logits, d_p = gl.split(halves)
    logits = gl.convert_layout(logits.reshape([HEADS, TILE]), PAIRED)
    d_p = gl.convert_layout(d_p.reshape([HEADS, TILE]), PAIRED)
    column = gl.arange(0, TILE, layout=gl.SliceLayout(0, PAIRED))
    is_far = index >= near_tiles
    slot = index * TILE + column
    seen = (slot < size) & (window_start + slot >= low)
    if MODE != NONE:
        slot = gl.where(is_far, slot - near_tiles * TILE, slot)
        seen = (is_far & (slot < count)) | ((index < near_tiles) & seen)
    p = gl.where(seen[None, :], gl.exp2(logits * factor - bottom[:, None]), 0.0)
    d_s = p * (d_p - delta[:, None]) * scale
    dtype: gl.constexpr = near.dtype.element_ty
    both = gl.convert_layout(gl.join(p.to(dtype), d_s.to(dtype)).permute([1, 2, 0]), STORED)
    key = gl.arange(0, TILE, layout=gl.SliceLayout(1, gl.SliceLayout(2, STORED)))
    which = gl.arange(0, 2, layout=gl.SliceLayout(0, gl.SliceLayout(2, STORED)))
    head = gl.arange(0, HEADS, layout=gl.SliceLayout(0, gl.SliceLayout(1, STORED)))
    target, most = near, size
    key += index * TILE
    if MODE != NONE:
        target, most = gl.where(is_far, far, near), gl.where(is_far, gl.minimum(count, num_far), size)
        key -= gl.where(is_far, near_tiles * TILE, 0)
    place = (key[:, None] * 2 + which[None, :]) * padded
    gl.store(target + (place[:, :, None] + head[None, None, :]), both, mask=(key < most)[:, None, None])


@gluon.jit
def _rows_ahead(
    index, tiles, near_tiles, row, window_start, next_start, begin, num_window, num_entries,
    MODE: gl.constexpr,
):  # fmt: skip
    """Of tile `index`, of the next query where it lies behind this one's last: rows of its keys, whether they
    are entries, whether it is the next query's."""
    is_next = index >= tiles
    start = gl.where(is_next, next_start - tiles * TILE, window_start) + index * TILE
    rows = gl.minimum(gl.maximum(start + row, 0), num_window - 1)
    is_far = (index >= near_tiles) & (index < tiles)
    if MODE != NONE:
        far = begin + (index - near_tiles) * TILE + row
        rows = gl.where(is_far, gl.minimum(far, num_entries - 1), rows)
    return rows, is_far, is_next


@gluon.jit
def _weigh_two(
    stacked, ring, turn, window, entries, bottom, delta, own_near, own_far, index, tiles, near_tiles,
    window_start, next_start, low, begin, count, size, batch, next_batch, num_window, num_entries, num_far,
    factor, scale, padded, MODE: gl.constexpr,
):  # fmt: skip
    """P and dS of two tiles written; those four further are copied over them."""
    row = gl.arange(0, TILE, layout=gl.SliceLayout(1, COPIED))
    async_copy.wait_group(RING - 2)
    fence_async_shared()
    even = _multiply(stacked, ring.index(turn))
    odd = _multiply(stacked, ring.index(turn + 1))
    rows, is_far, is_next = _rows_ahead(
        index + RING, tiles, near_tiles, row, window_start, next_start, begin, num_window,
        num_entries, MODE,
    )  # fmt: skip
    more, is_far_more, is_next_more = _rows_ahead(
        index + 1 + RING, tiles, near_tiles, row, window_start, next_start, begin, num_window,
        num_entries, MODE,
    )  # fmt: skip
    product = warpgroup_mma_wait(1, deps=(even,))
    gl.thread_barrier()
    copy_keys(
        ring.index(turn), window, entries, rows, is_far, gl.where(is_next, next_batch, batch),
        num_window, num_entries,
    )  # fmt: skip
    _store(
        product, index, bottom, delta, own_near, own_far, low, count, window_start,
        near_tiles, num_far, size, factor, scale, padded, MODE,
    )  # fmt: skip
    product = warpgroup_mma_wait(0, deps=(odd,))
    gl.thread_barrier()
    copy_keys(
        ring.index(turn + 1), window, entries, more, is_far_more,
        gl.where(is_next_more, next_batch, batch), num_window, num_entries,
    )  # fmt: skip
    _store(
        product, index + 1, bottom, delta, own_near, own_far, low, count, window_start,
        near_tiles, num_far, size, factor, scale, padded, MODE,
    )  # fmt: skip


# Heads' padding stays special: a multiple of 16 lets stores be wide.
@gluon.jit(do_not_specialize=[*LENGTHS, "size", "start", "end", "num_far", "num_blocks"])
def _weigh(
    query, window, entries, picks, oldest, first, stop, sink, grad, out, lse, d_sink, near, far, scale,
    num_queries, num_window, num_entries, num_picks, num_heads, offset, size, start, end, num_far, num_blocks,
    padded, MODE: gl.constexpr,
):  # fmt: skip
    staging = gl.allocate_shared_memory(query.dtype, [HEADS, WIDTH], query.layout)
    ring = gl.allocate_shared_memory(query.dtype, [RING, TILE, WIDTH], query.layout)
    is_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(is_full, 1)
    fence_async_shared()
    row = gl.arange(0, TILE, layout=gl.SliceLayout(1, COPIED))
    r = gl.arange(0, HEADS, layout=gl.SliceLayout(1, COPIED))
    c = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, COPIED))
    head = gl.arange(0, HEADS, layout=gl.SliceLayout(1, PAIRED))
    num_shares = num_heads // HEADS
    near_tiles = gl.cdiv(size, TILE)
    factor = scale * LOG2_E

    # Of all blocks (row, query of the range, share of the heads) the later ones first: they see more.
    block = num_blocks - 1 - gl.program_id(0)
    batch, token = block // num_shares // (end - start), start + block // num_shares % (end - start)
    at = (batch * num_queries + token) * num_shares + block % num_shares
    low, begin, count = bounds_of(at, oldest, first, stop, num_queries, num_picks, num_shares, MODE)
    _copy_query(staging, query, at, is_full)
    for tile in gl.static_range(RING):
        rows = token + (offset + 1 - size) + tile * TILE + row
        rows = gl.minimum(gl.maximum(rows, 0), num_window - 1)
        copy_keys(ring.index(tile), window, entries, rows, False, batch, num_window, num_entries)
    turn, phase = 0, 0
    for _ in range(gl.program_id(0), num_blocks, gl.num_programs(0)):
        following = gl.maximum(block - gl.num_programs(0), 0)
        next_batch = following // num_shares // (end - start)
        next_token = start + following // num_shares % (end - start)
        next_at = (next_batch * num_queries + next_token) * num_shares + following % num_shares
        next_low, next_begin, next_count = bounds_of(
            next_at, oldest, first, stop, num_queries, num_picks, num_shares, MODE
        )
        # Q, dO and O of this query.
        own = at.to(gl.int64) * HEADS
        output = gl.load(out + own * WIDTH + (r[:, None] * WIDTH + c[None, :]))
        bottom = gl.load(lse + own + head)
        sinks = gl.load(sink + block % num_shares * HEADS + head).to(gl.float32) * LOG2_E
        mbarrier.wait(is_full, phase)
        q = staging.load(HALF)
        gl.thread_barrier()
        _copy_query(staging, grad, at, is_full)
        mbarrier.wait(is_full, 1 - phase)
        delta = gl.sum(output.to(gl.float32) * staging.load(COPIED).to(gl.float32), 1)
        delta = gl.convert_layout(delta, gl.SliceLayout(1, PAIRED))
        stacked = _stack(q, staging.load(HALF))
        gl.thread_barrier()
        _copy_query(staging, query, next_at, is_full)
        gl.store(d_sink + own + head, -delta * gl.exp2(sinks - bottom))

        # An even number of tiles: the products of even and odd ones have registers of their own.
        tiles = near_tiles
        if MODE != NONE:
            tiles += gl.cdiv(count, TILE)
        tiles = gl.cdiv(tiles, 2) * 2
        window_start = token + (offset + 1 - size)
        next_start = next_token + (offset + 1 - size)
        place = (batch * (end - start) + token - start).to(gl.int64)
        own_near = near + place * size * (2 * padded) + block % num_shares * HEADS
        own_far = far + place * num_far * (2 * padded) + block % num_shares * HEADS
        # The weights of an entry lie at its column.
        own_far += begin.to(gl.int64) * (2 * padded)
        for index in range(0, tiles, 2):
            _weigh_two(
                stacked, ring, turn, window, entries, bottom, delta, own_near, own_far, index, tiles,
                near_tiles, window_start, next_start, low, begin, count, size, batch, next_batch, num_window,
                num_entries, num_far, factor, scale, padded, MODE,
            )  # fmt: skip
            turn = RING - 2 - turn
        block, token, batch, at = following, next_token, next_batch, next_at
        low, begin, count = next_low, next_begin, next_count
    mbarrier.wait(is_full, phase)
    async_copy.wait_group(0)


def weigh(
    problem: Problem, results: tuple[Tensor, Tensor], grad: Tensor, weights: tuple[Tensor, Tensor],
    d_sink: Tensor, begin: int, end: int,
) -> None:  # fmt: skip
    """Writes the weights of keys and of entries and the sink's parts of the queries begin … end - 1."""
    rows, _, num_heads, _ = problem.query.shape
    num_blocks = rows * (end - begin) * (num_heads // HEADS.value)
    _weigh[(min(num_blocks, chip_of(grad).multi_processor_count),)](
        flat(problem.query), *tensors_of(problem), flat(grad), *results, d_sink, *weights, problem.scale,
        *problem.lengths, problem.size, begin, end, weights[1].shape[2], num_blocks, weights[0].shape[4],
        MODE=problem.mode, num_warps=WARPS,
    )  # fmt: skip
