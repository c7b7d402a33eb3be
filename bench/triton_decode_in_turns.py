"""A candidate for attention of a decoding step (triton_decode_attention.py; Gluon, Hopper): two warp groups
in turns and one that copies, as triton_attention_gluon.py, which says how. Never timed.

A program of the chosen kernel has an SM to itself and one tile of keys on its way: 9.5 us a tile of 64 where
the copy rate would take 2.8. Here a tile is copied while two others are multiplied. A row's keys are cut into
the same stretches, so its bits do not depend on its company.

Of heads a multiple of 64, 512 channels, half precision.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared, mbarrier, tma

from consilience.model.kernels.triton_attention_gluon import (
    COPIED,
    COPY_REGISTERS,
    HALF,
    LINE,
    LOGITS,
    ODD_REGISTERS,
    SUMS,
    _add_pair,
    _shrunk,
    _sum_own,
)
from consilience.model.kernels.triton_attention_parts_gluon import HEADS, LOG2_E, TILE, WIDTH, chip_of, flat
from consilience.model.kernels.triton_decode_attention import COMBINE, _combine_splits

LOWEST = gl.constexpr(-1e30)  # not infinite: less it would be no number
ROWS, TABLES, WINDOW = gl.constexpr(2), gl.constexpr(1), gl.constexpr(0)  # how entries are found
NUMBERS = [
    "ring",
    "size",
    "ratio",
    "per",
    "table_stride",
    "num_picks",
    "num_tokens",
    "num_heads",
    "num_blocks",
]


@gluon.jit
def _stretch(block, position, size, ratio, num_picks, num_shares, SPLITS: gl.constexpr):
    """Of a block (query, stretch, share of heads): query, its position, its window keys; the stretch."""
    number = block // (SPLITS * num_shares)
    here = gl.load(position + number).to(gl.int32)
    near = gl.minimum(here + 1, size)
    total = gl.cdiv(near, TILE) * TILE + gl.minimum((here + 1) // ratio, num_picks)
    each = gl.cdiv(gl.cdiv(total, SPLITS), TILE) * TILE
    begin = block // num_shares % SPLITS * each
    return number, here, near, begin, gl.minimum(begin + each, total)


@gluon.jit
def _is_seen(tile, place, KIND: gl.constexpr):
    """Which keys of a tile of the stretch there are."""
    begin, stop, near, own_rows = place
    key = begin + tile * TILE + gl.arange(0, TILE, layout=gl.SliceLayout(0, LOGITS))
    entry = key - gl.cdiv(near, TILE) * TILE
    is_far = (entry >= 0) & (key < stop)
    if KIND == ROWS:
        is_far = gl.load(own_rows + entry, mask=is_far, other=-1) >= 0
    return (key < gl.minimum(near, stop)) | is_far


@gluon.jit
def _attend(
    q_buffers, k_buffers, p_buffers, tops, totals, q_full, q_empty, k_full, k_empty, p_full, t_full,
    position, rows, sink, out, partial, stats, scale,
    size, ratio, num_picks, num_heads, num_blocks,
    SPLITS: gl.constexpr, KIND: gl.constexpr, SIDE: gl.constexpr,
):  # fmt: skip
    """One side of the two: half of the channels of a program's blocks."""
    head = gl.arange(0, HEADS, layout=gl.SliceLayout(1, LOGITS))
    head_of_sum = gl.arange(0, HEADS, layout=gl.SliceLayout(1, SUMS))
    channel = gl.arange(0, HALF, layout=gl.SliceLayout(0, SUMS))
    num_shares = num_heads // HEADS
    factor = scale * LOG2_E
    phase, done = 0, 0
    for block in range(gl.program_id(0), num_blocks, gl.num_programs(0)):
        number, _, near, begin, stop = _stretch(block, position, size, ratio, num_picks, num_shares, SPLITS)
        if begin < stop:
            pairs = gl.cdiv(stop - begin, 2 * TILE)
            first_head = block % num_shares * HEADS
            place = (begin, stop, near, rows + number.to(gl.int64) * num_picks)
            top = gl.zeros([HEADS], gl.float32, gl.SliceLayout(1, LOGITS)) + LOWEST
            if SPLITS == 1:
                top = gl.load(sink + first_head + head).to(gl.float32) * LOG2_E
            sunk = top
            sums = _sum_own(gl.zeros([HEADS, TILE], gl.float32, LOGITS))
            acc = gl.zeros([HEADS, HALF], gl.float32, SUMS)
            mbarrier.wait(q_full, phase)
            phase = 1 - phase
            for pair in range(pairs):
                top, sums, acc = _add_pair(
                    q_buffers, k_buffers, p_buffers, tops, q_empty, k_full, k_empty, p_full, top, sums, acc,
                    pair, done, place, factor, pair + 1 == pairs, _is_seen, KIND, SIDE,
                )  # fmt: skip
                done += 1
            part = gl.convert_layout(gl.sum(sums, 1), gl.SliceLayout(1, LOGITS))
            totals.index(SIDE).store(part)
            gl.thread_barrier()
            mbarrier.arrive(t_full.index(SIDE), count=1)
            mbarrier.wait(t_full.index(1 - SIDE), 1 - phase)
            total = part + totals.index(1 - SIDE).load(gl.SliceLayout(1, LOGITS))
            if SPLITS == 1:
                acc = _shrunk(acc, 1.0 / (total + gl.exp2(sunk - top)))
                carrier = k_buffers.index(2 + SIDE)
                carrier.store(acc.to(k_buffers.dtype))
                fence_async_shared()
                gl.thread_barrier()
                tma.async_copy_shared_to_global(out, [number * num_heads + first_head, SIDE * HALF], carrier)
                tma.store_wait(0)
            else:
                own = number * SPLITS + block // num_shares % SPLITS
                if SIDE == 0:
                    at = stats + 2 * own * num_heads + first_head + head
                    gl.store(at, top)
                    gl.store(at + num_heads, total)
                at = partial + (own.to(gl.int64) * num_heads + first_head) * WIDTH + SIDE * HALF
                gl.store(at + (head_of_sum[:, None] * WIDTH + channel[None, :]), acc)
            gl.thread_barrier()
            mbarrier.arrive(k_empty.index(1), count=1)


@gluon.jit
def _place_of(
    index, window, pages, rows, tables, number, here, near, begin, stop, ring, per, table_stride, num_picks,
    num_tokens, KIND: gl.constexpr,
):  # fmt: skip
    """Of a stretch's tile, all of it window or all of it entries: where these begin, and which rows [TILE] of
    that are its keys; behind the last key that again."""
    row = number // num_tokens
    first, padded = begin + index * TILE, gl.cdiv(near, TILE) * TILE
    lane = gl.arange(0, TILE, layout=gl.SliceLayout(1, COPIED))
    base = window + row.to(gl.int64) * ring * WIDTH
    key = gl.minimum(gl.minimum(first + lane, near - 1), stop - 1)
    at = ((here - near + 1 + key) % ring).to(gl.int64)
    if KIND != WINDOW:
        is_far = (first >= padded) & (first < stop)
        entry = gl.maximum(gl.minimum(first + lane, stop - 1) - padded, 0)
        if KIND == ROWS:
            entry = gl.load(
                rows + number.to(gl.int64) * num_picks + entry, mask=(entry >= 0) & is_far, other=0
            )
            entry = gl.maximum(entry, 0).to(gl.int64)
        else:
            held = gl.load(tables + row * table_stride + entry // per, mask=(entry >= 0) & is_far, other=0)
            entry = held.to(gl.int64) * per + entry % per
        base, at = gl.where(is_far, pages, base), gl.where(is_far, entry, at)
    return base, at


@gluon.jit
def _copy_tiles(
    q_buffers, k_buffers, q_full, q_empty, k_full, k_empty, query, window, pages, rows, tables, position,
    ring, size, ratio, per, table_stride, num_picks, num_tokens, num_heads, num_blocks,
    SPLITS: gl.constexpr, KIND: gl.constexpr,
):  # fmt: skip
    """Copies a program's queries and their tiles, each once its buffer is free."""
    c = gl.arange(0, HALF, layout=gl.SliceLayout(0, COPIED))
    num_shares = num_heads // HEADS
    phase, done = 0, 0
    for block in range(gl.program_id(0), num_blocks, gl.num_programs(0)):
        number, here, near, begin, stop = _stretch(
            block, position, size, ratio, num_picks, num_shares, SPLITS
        )
        if begin < stop:
            mbarrier.wait(q_empty, 1 - phase)
            phase = 1 - phase
            mbarrier.expect(q_full, HEADS * WIDTH * 2)
            own = number * num_heads + block % num_shares * HEADS
            tma.async_copy_global_to_shared(query, [own, 0], q_full, q_buffers.index(0))
            tma.async_copy_global_to_shared(query, [own, HALF], q_full, q_buffers.index(1))
            for index in range(gl.cdiv(stop - begin, 2 * TILE) * 2):
                base, at = _place_of(
                    index, window, pages, rows, tables, number, here, near, begin, stop, ring, per,
                    table_stride, num_picks, num_tokens, KIND,
                )  # fmt: skip
                slot = index % 2
                mbarrier.wait(k_empty.index(slot), (done + 1) % 2)
                keys = base + (at[:, None] * WIDTH + c[None, :])
                async_copy.async_copy_global_to_shared(k_buffers.index(2 * slot), keys)
                async_copy.async_copy_global_to_shared(k_buffers.index(2 * slot + 1), keys + HALF)
                async_copy.commit_group()
                async_copy.wait_group(0)
                fence_async_shared()
                gl.thread_barrier()
                mbarrier.arrive(k_full.index(slot), count=1)
                done += slot


@gluon.jit(do_not_specialize=NUMBERS)
def _decode(
    query, window, pages, rows, tables, position, sink, out, partial, stats, scale,
    ring, size, ratio, per, table_stride, num_picks, num_tokens, num_heads, num_blocks,
    SPLITS: gl.constexpr, KIND: gl.constexpr,
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
                position, rows, sink, out, partial, stats, scale,
                size, ratio, num_picks, num_heads, num_blocks, SPLITS, KIND, 0,
            )),
            (_attend, (
                q_buffers, k_buffers, p_buffers, tops, totals,
                q_full, q_empty, k_full, k_empty, p_full, t_full,
                position, rows, sink, out, partial, stats, scale,
                size, ratio, num_picks, num_heads, num_blocks, SPLITS, KIND, 1,
            )),
            (_copy_tiles, (
                q_buffers, k_buffers, q_full, q_empty, k_full, k_empty,
                query, window, pages, rows, tables, position,
                ring, size, ratio, per, table_stride, num_picks, num_tokens, num_heads, num_blocks,
                SPLITS, KIND,
            )),
        ],
        [4, 4], [ODD_REGISTERS, COPY_REGISTERS],
    )  # fmt: skip


def attend(
    query: Tensor, window: Tensor, position: Tensor, sink: Tensor, scale: float, size: int, num_splits: int,
    *, ratio: int = 1, pages: Tensor | None = None, tables: Tensor | None = None, rows: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`triton_decode_attention.attend`."""
    num_rows, num_tokens, num_heads, width = query.shape
    numbers, out = num_rows * num_tokens, torch.empty_like(query)
    partial = stats = sink
    if num_splits > 1:
        partial = query.new_empty(numbers, num_splits, num_heads, width, dtype=torch.float32)
        stats = query.new_empty(numbers, num_splits, 2, num_heads, dtype=torch.float32)
    per = 1 if pages is None else pages.shape[1]
    stride, num_held = (0, 0) if tables is None else (tables.stride(0), tables.shape[1])
    num_picks = num_held * per if rows is None else rows.shape[2]
    kind = WINDOW if pages is None else TABLES if rows is None else ROWS
    num_blocks = numbers * num_splits * (num_heads // HEADS.value)
    _decode[(min(num_blocks, chip_of(out).multi_processor_count),)](
        flat(query, HALF.value), window, window if pages is None else pages,
        position if rows is None else rows, position if tables is None else tables, position, sink,
        flat(out, HALF.value), partial, stats, scale,
        window.shape[1], size, ratio, per, stride, num_picks, num_tokens, num_heads, num_blocks,
        SPLITS=num_splits, KIND=kind.value, num_warps=4,
    )  # fmt: skip
    if num_splits > 1:
        columns = min(COMBINE["columns"], width)
        _combine_splits[(numbers, num_heads, triton.cdiv(width, columns))](
            partial, stats, position, sink, out, num_heads, width, size, ratio, num_picks,
            SPLITS=num_splits, BLOCK_S=triton.next_power_of_2(num_splits), BLOCK_N=TILE.value,
            BLOCK_C=columns, TILE=min(COMBINE["splits"], triton.next_power_of_2(num_splits)),
            PADS=True, num_warps=COMBINE["num_warps"],
        )  # fmt: skip
    return out
