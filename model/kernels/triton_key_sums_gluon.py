"""A tile's gradients of its keys, added where they belong: the second partition of attention's backward on
Hopper (Gluon; triton_attention_backward_gluon.py).

Four warps of their own multiply Pᵀ dO + dSᵀ Q, 64 channels at a time, and add the products in L2 while the
others make the next tile's P and dS. Additions in any order give the same bits because they are additions of
integers: a gradient times a power of two, rounded; two of 31 bits ride in one of 64.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from consilience.model.kernels.triton_attention_parts_gluon import (
    GATHER,
    HEADS,
    NONE,
    TILE,
    WIDTH,
    bounds_of,
)

ADDER_WARPS = gl.constexpr(4)
CHUNK = gl.constexpr(64)  # channels of a tile's gradients at a time
PART = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [ADDER_WARPS.value, 1], [16, 64, 16]))
# Pairs of channels as they are added: eight lanes cover 64 bytes of a row.
ADDED = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[8, 0], [1, 0], [0, 8], [0, 16]],
        lane_bases=[[0, 1], [0, 2], [0, 4], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 32],
    )
)
LISTED = gl.constexpr(gl.BlockedLayout([1, 8], [1, 32], [ADDER_WARPS.value, 1], [1, 0]))
WINDOW = gl.constexpr(32)  # blocks of which one is measured


@gluon.jit
def block_of(
    index, oldest, first, stop, num_queries, num_shares, offset, first_block, end_block,
    MODE: gl.constexpr, MEASURES: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """The block that is a program's `index`-th: the last first, as they see more.

    Measuring, one of every WINDOW: in turns the one that sees the fewest keys, and the one that sees the
    fewest entries, since the fewer there are the larger are their weights.
    """
    block = end_block - 1 - index
    if MEASURES:
        group = first_block + index * WINDOW + gl.arange(0, WINDOW, layout=gl.SliceLayout(0, LAYOUT))
        is_there = group < end_block
        at = gl.where(is_there, group, first_block) // num_shares
        seen = at % num_queries + offset + 1 - gl.load(oldest + at)
        if MODE != NONE:
            far = gl.load(stop + at) - gl.load(first + at)
            seen = gl.where((index % 2 == 1) & (far > 0), far, seen + num_queries)
        seen = gl.where(is_there, seen, 2147483647)
        block = gl.min(gl.where(seen == gl.min(seen, 0), group, end_block - 1), 0)
    return block


@gluon.jit
def _largest(part):
    """[TILE, 8]: largest |part| over the columns that a thread holds, which needs no other thread."""
    groups = gl.abs(part).reshape([TILE, 8, 4, 2])
    return gl.max(gl.max(groups, 3), 1)


@gluon.jit
def _multiply(p_buffer, s_buffer, grads, queries, part_index):
    """Pᵀ dO + dSᵀ Q of 64 channels."""
    part = warpgroup_mma(
        p_buffer.permute([1, 0]), grads.index(part_index),
        gl.zeros([TILE, CHUNK], gl.float32, PART), use_acc=False, is_async=True,
    )  # fmt: skip
    part = warpgroup_mma(s_buffer.permute([1, 0]), queries.index(part_index), part, is_async=True)
    return warpgroup_mma_wait(0, deps=(part,))


@gluon.jit
def _whole(x, scale):
    """x · scale to the nearest integer, halves away from zero: half with x's sign, one multiplication."""
    half = ((x.to(gl.int32, bitcast=True) & -2147483648) | 0x3F000000).to(gl.float32, bitcast=True)
    return gl.fma(x, scale + gl.zeros_like(x), half).to(gl.int32)


@gluon.jit
def _add(part, sums, offsets, scale):
    """Add part [TILE, CHUNK] · scale, as integers, to pairs of channels from each key's offset on."""
    low, high = gl.split(part.reshape([TILE, CHUNK // 2, 2]))
    low, high = _whole(low, scale), _whole(high, scale)
    both = gl.convert_layout((high.to(gl.int64) << 32) + low.to(gl.int64), ADDED)
    column = gl.arange(0, CHUNK // 2, layout=gl.SliceLayout(0, ADDED))
    gl.atomic_add(sums + (offsets[:, None] + column[None, :]), both, sem="relaxed")


@gluon.jit
def _rows_of(
    index, near_tiles, window_start, begin, count, own_picks, num_window, num_entries, MODE: gl.constexpr
):
    """Whether tile `index` is of entries, and rows of its keys; some row for those that are not seen."""
    is_far = index >= near_tiles
    slot = gl.where(is_far, index - near_tiles, index) * TILE + gl.arange(
        0, TILE, layout=gl.SliceLayout(1, ADDED)
    )
    rows = gl.minimum(gl.maximum(window_start + slot, 0), num_window - 1)
    if MODE != NONE:
        far = gl.minimum(begin + slot, num_entries - 1)
        if MODE == GATHER:
            far = gl.load(own_picks + 2 * slot, mask=(slot < count) & is_far, other=-1)
            far = gl.where(far < 0, gl.minimum(slot, num_entries - 1), far)
        rows = gl.where(is_far, far, rows)
    return is_far, rows


@gluon.jit
def add_tiles(
    queries, grads, p_buffers, s_buffers, is_loaded, is_full, is_empty, is_released,
    picks, oldest, first, stop, near_sums, far_sums, scales, largest,
    num_queries, num_window, num_entries, num_picks, num_heads, offset, size,
    first_block, end_block, num_indices,
    MODE: gl.constexpr, MEASURES: gl.constexpr,
):  # fmt: skip
    """Adds all tiles of a program's queries; measuring, only finds their largest part.

    queries, grads [8, 64 heads, 64 channels]: each is given back with is_released after a query's last tile.
    p_buffers, s_buffers [2, 64 heads, 64 keys]: P and dS of a tile, in turns, with is_full and is_empty.
    """
    num_shares = num_heads // HEADS
    near_tiles = gl.cdiv(size, TILE)
    near_scale, far_scale = gl.load(scales), gl.load(scales + 1)
    near_top = _largest(gl.zeros([TILE, CHUNK], gl.float32, PART))
    far_top = near_top
    phase, done = 0, 0
    for turn in range(gl.program_id(0), num_indices, gl.num_programs(0)):
        block = block_of(
            turn, oldest, first, stop, num_queries, num_shares, offset, first_block, end_block,
            MODE, MEASURES, LISTED,
        )  # fmt: skip
        token, batch = block // num_shares % num_queries, block // num_shares // num_queries
        _, begin, count = bounds_of(block, oldest, first, stop, num_queries, num_picks, num_shares, MODE)
        tiles = near_tiles
        if MODE != NONE:
            tiles += gl.cdiv(count, TILE)
        own_picks = picks + (block // num_shares).to(gl.int64) * (2 * num_picks)
        mbarrier.wait(is_loaded, phase)
        phase = 1 - phase
        for index in range(tiles):
            is_far, rows = _rows_of(
                index, near_tiles, token + (offset + 1 - size), begin, count, own_picks, num_window,
                num_entries, MODE,
            )  # fmt: skip
            sums = near_sums + batch.to(gl.int64) * num_window * (WIDTH // 2)
            scale = near_scale
            if MODE != NONE:
                sums = gl.where(is_far, far_sums + batch.to(gl.int64) * num_entries * (WIDTH // 2), sums)
                scale = gl.where(is_far, far_scale, near_scale)
            offsets = rows * (WIDTH // 2)
            slot = done % 2
            mbarrier.wait(is_full.index(slot), done // 2 % 2)
            top = _largest(gl.zeros([TILE, CHUNK], gl.float32, PART))
            for part_index in range(WIDTH // CHUNK):
                part = _multiply(p_buffers.index(slot), s_buffers.index(slot), grads, queries, part_index)
                if index + 1 == tiles:
                    gl.thread_barrier()
                    mbarrier.arrive(is_released.index(part_index), count=1)
                top = gl.maximum(top, _largest(part))
                if not MEASURES:
                    _add(part, sums, offsets, scale)
                    offsets += CHUNK // 2
            gl.thread_barrier()
            mbarrier.arrive(is_empty.index(slot), count=1)
            far_top = gl.where(is_far, gl.maximum(far_top, top), far_top)
            near_top = gl.where(is_far, near_top, gl.maximum(near_top, top))
            done += 1
    gl.atomic_max(largest, gl.max(gl.max(near_top, 1), 0).to(gl.int32, bitcast=True), sem="relaxed")
    gl.atomic_max(largest + 1, gl.max(gl.max(far_top, 1), 0).to(gl.int32, bitcast=True), sem="relaxed")
