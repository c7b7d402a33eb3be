"""Attention forward by hand-placed copies (Gluon, Hopper); the same function as triton_attention.py's.

A program stays on its SM and takes query after query, 64 heads × 512 channels each; tiles of 64 keys pass
through two buffers. While the tile's first product runs, the next tile is copied into the buffer whose second
product has ended, and the addresses of the one after it are read; behind a query's last tile stands the next
query's first. The query itself is replaced once its last logits are there, and its output leaves from the
buffer of its last tile while the next query begins.

    iteration    wait for tile i | issue S = Q Kᵀ | copy tile i + 1 | wait for S | softmax, P to shared memory
                 | O += P K
    window       always the same number of tiles, so a tile behind a query's last needs no bounds

B rows, T queries, H heads, S window keys, M entries, K picks of a query, W window.
Shared memory: query 64 KiB, keys 2 × 64, P 8. Registers of 256 threads: O takes 128, S 16.
"""

from __future__ import annotations

from typing import Any

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
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from consilience.model.kernels import attention_problem
from consilience.model.kernels.attention_problem import Problem

LOG2_E = gl.constexpr(1.4426950408889634)
NONE, GATHER = gl.constexpr(attention_problem.NONE), gl.constexpr(attention_problem.GATHER)
HEADS, WIDTH, TILE = gl.constexpr(64), gl.constexpr(512), gl.constexpr(64)
WARPS = 8
LENGTHS = ["num_queries", "num_window", "num_entries", "num_picks", "num_heads", "offset"]
SHARED = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
# A warp copies half a row of keys at a time, 16 bytes a lane.
COPIED = gl.constexpr(gl.BlockedLayout([1, 8], [1, 32], [WARPS, 1], [1, 0]))
# Two warp groups of 64 rows: each half of the tile's keys, and half of the channels.
LOGITS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 32, 16]))
SUMS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 256, 16]))


@gluon.jit
def _seen(block, oldest, first, stop, num_queries, num_picks, num_shares, MODE: gl.constexpr):
    """Of a block: its first window key that belongs to its sample, its first entry and number of entries."""
    at = block // num_shares
    low = gl.load(oldest + at).to(gl.int32)
    begin, count = low, low
    if MODE != NONE:
        begin = gl.load(first + at).to(gl.int32)
        count = gl.maximum(gl.load(stop + at).to(gl.int32) - begin, 0)
        if MODE == GATHER:
            count = gl.minimum(count, num_picks)
    return low, begin, count


@gluon.jit
def _copy_keys(buffer, window, entries, rows, is_far, batch, num_window, num_entries):
    c = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, COPIED))
    base = gl.where(is_far, entries, window)
    base += batch.to(gl.int64) * gl.where(is_far, num_entries, num_window) * WIDTH
    async_copy.async_copy_global_to_shared(buffer, base + (rows[:, None] * WIDTH + c[None, :]))
    async_copy.commit_group()


@gluon.jit
def _copy_query(buffer, query, block, is_full):
    mbarrier.expect(is_full, HEADS * WIDTH * 2)
    tma.async_copy_global_to_shared(query, [block * HEADS, 0], is_full, buffer)


@gluon.jit
def _sum_own(x):
    """[HEADS, 8]: sums over the columns that a thread holds, which needs no other thread."""
    groups = x.reshape([HEADS, 2, 4, 4, 2])
    return gl.sum(gl.sum(groups, 4), 2).reshape([HEADS, 8])


@gluon.jit(do_not_specialize=[*LENGTHS, "num_blocks", "size"])
def _forward(
    query, window, entries, picks, oldest, first, stop, sink, out, lse, scale,
    num_queries, num_window, num_entries, num_picks, num_heads, offset, num_blocks, size,
    MODE: gl.constexpr,
):  # fmt: skip
    q_buffer = gl.allocate_shared_memory(query.dtype, [HEADS, WIDTH], out.layout)
    k_buffer = gl.allocate_shared_memory(query.dtype, [2, TILE, WIDTH], out.layout)
    is_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(is_full, 1)
    fence_async_shared()
    p_buffer = gl.allocate_shared_memory(query.dtype, [HEADS, TILE], out.layout)
    row = gl.arange(0, TILE, layout=gl.SliceLayout(1, COPIED))
    column = gl.arange(0, TILE, layout=gl.SliceLayout(0, LOGITS))
    head = gl.arange(0, HEADS, layout=gl.SliceLayout(1, LOGITS))
    num_shares = num_heads // HEADS
    near_tiles = gl.cdiv(size, TILE)
    factor = scale * LOG2_E

    # Later queries see more: they begin first.
    block = num_blocks - 1 - gl.program_id(0)
    token, batch = block // num_shares % num_queries, block // num_shares // num_queries
    low, begin, count = _seen(block, oldest, first, stop, num_queries, num_picks, num_shares, MODE)
    slot = token + (offset + 1 - size) + row
    rows = gl.minimum(gl.maximum(slot, 0), num_window - 1)
    _copy_query(q_buffer, query, block, is_full)
    _copy_keys(k_buffer.index(0), window, entries, rows, False, batch, num_window, num_entries)
    buffer, phase = 0, 0
    rows = gl.minimum(gl.maximum(slot + TILE, 0), num_window - 1)
    for _ in range(gl.program_id(0), num_blocks, gl.num_programs(0)):
        following = gl.maximum(block - gl.num_programs(0), 0)
        next_token = following // num_shares % num_queries
        next_batch = following // num_shares // num_queries
        next_low, next_begin, next_count = _seen(
            following, oldest, first, stop, num_queries, num_picks, num_shares, MODE
        )
        tiles = near_tiles
        if MODE != NONE:
            tiles += gl.cdiv(count, TILE)
        own = block // num_shares * num_heads + block % num_shares * HEADS
        window_start = token + (offset + 1 - size)
        own_picks = picks + (block // num_shares).to(gl.int64) * (2 * num_picks)
        top = gl.load(sink + block % num_shares * HEADS + head).to(gl.float32) * LOG2_E
        sink_logit = top
        sums = _sum_own(gl.zeros([HEADS, TILE], gl.float32, LOGITS))
        acc = gl.zeros([HEADS, WIDTH], gl.float32, SUMS)
        mbarrier.wait(is_full, phase)
        phase = 1 - phase
        for index in range(tiles):
            async_copy.wait_group(0)
            fence_async_shared()
            keys = k_buffer.index(buffer)
            product = warpgroup_mma(
                q_buffer, keys.permute([1, 0]), gl.zeros([HEADS, TILE], gl.float32, LOGITS),
                use_acc=False, is_async=True,
            )  # fmt: skip
            place = (index - near_tiles) * TILE + column
            seen = window_start + index * TILE + column >= low
            seen &= window_start + index * TILE + column <= token + offset
            if MODE != NONE:
                seen_far = place < count
                if MODE == GATHER:
                    seen_far = gl.load(own_picks + 2 * place, mask=(place >= 0) & seen_far, other=-1) >= 0
                seen = (seen & (index < near_tiles)) | (seen_far & (index >= near_tiles))
            logits = warpgroup_mma_wait(0, deps=(product,))
            if index + 1 == tiles:
                gl.thread_barrier()
                _copy_query(q_buffer, query, following, is_full)
            logits = gl.where(seen[None, :], logits * factor, float("-inf"))
            higher = gl.maximum(top, gl.max(logits, 1))
            wide = gl.exp2(logits - higher[:, None])
            shrink = gl.exp2(top - higher)
            top = higher
            sums = sums * gl.convert_layout(shrink, gl.SliceLayout(1, sums.type.layout))[:, None] + _sum_own(
                wide
            )
            acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, SUMS))[:, None]
            p = wide.to(query.dtype)
            p_buffer.store(p)
            fence_async_shared()
            gl.thread_barrier()
            acc = warpgroup_mma(p_buffer, keys, acc, is_async=True)
            # The other buffer is free: all warps have waited for its products, one for its output.
            if index == 0:
                tma.store_wait(0)
            is_next = index + 1 == tiles
            is_far = (index + 1 >= near_tiles) & (index + 1 < tiles)
            _copy_keys(
                k_buffer.index(1 - buffer), window, entries, rows, is_far,
                gl.where(is_next, next_batch, batch), num_window, num_entries,
            )  # fmt: skip
            ahead = index + 2
            is_next = ahead >= tiles
            start = (
                gl.where(is_next, next_token + (offset + 1 - size) - tiles * TILE, window_start)
                + ahead * TILE
            )
            rows = gl.minimum(gl.maximum(start + row, 0), num_window - 1)
            if MODE != NONE:
                is_far = (ahead >= near_tiles) & (ahead < tiles)
                far = (ahead - near_tiles) * TILE + row
                if MODE == GATHER:
                    far = gl.maximum(gl.load(own_picks + 2 * far, mask=(far < count) & is_far, other=0), 0)
                else:
                    far = gl.minimum(begin + far, num_entries - 1)
                rows = gl.where(is_far, far, rows)
            acc = warpgroup_mma_wait(0, deps=(acc,))
            buffer = 1 - buffer
        total = gl.convert_layout(gl.sum(sums, 1), gl.SliceLayout(1, LOGITS)) + gl.exp2(sink_logit - top)
        gl.store(lse + own + head, top + gl.log2(total))
        acc = acc * gl.convert_layout(1.0 / total, gl.SliceLayout(1, SUMS))[:, None]
        # The last tile's buffer carries the output.
        gl.thread_barrier()
        carrier = k_buffer.index(1 - buffer)
        carrier.store(acc.to(query.dtype))
        fence_async_shared()
        gl.thread_barrier()
        tma.async_copy_shared_to_global(out, [own, 0], carrier)
        block, token, batch = following, next_token, next_batch
        low, begin, count = next_low, next_begin, next_count
    mbarrier.wait(is_full, phase)
    async_copy.wait_group(0)
    tma.store_wait(0)


def is_available(problem: Problem) -> bool:
    """Whether this forward and triton_attention_weights_gluon.py take the call: on Hopper, whole groups of 64
    heads, 512 channels in half precision, a window of four tiles of 32 keys, entries not by mask."""
    query = problem.query
    fits = query.shape[2] % HEADS.value == 0 and query.shape[3] == WIDTH.value
    fits &= query.element_size() == 2 and problem.size > 96 and problem.mode != attention_problem.MASK
    return fits and chip_of(query).major == 9


def chip_of(x: Tensor) -> Any:
    """The properties of a tensor's GPU."""
    return torch.cuda.get_device_properties(x.device)


def flat(x: Tensor, width: int = WIDTH.value) -> TensorDescriptor:
    """Rows of channels for copies of blocks of 64 heads × `width`."""
    return TensorDescriptor.from_tensor(x.view(-1, x.shape[-1]), [HEADS.value, width], SHARED)


def tensors_of(problem: Problem) -> tuple[Any, ...]:
    """query … sink as these kernels take them: of the picks, 32-bit words, low before high."""
    _, window, entries, picks, *rest = problem.tensors
    entries = entries if problem.num_entries else window  # of one type, whichever is read
    return flat(problem.query), window, entries, picks.view(torch.int32), *rest


def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    """`triton_attention.forward` on Hopper."""
    rows, num_queries, num_heads, _ = problem.query.shape
    out = torch.empty_like(problem.query)
    lse = torch.empty(rows, num_queries, num_heads, dtype=torch.float32, device=out.device)
    num_blocks = rows * num_queries * (num_heads // HEADS.value)
    _forward[(min(num_blocks, chip_of(out).multi_processor_count),)](
        *tensors_of(problem), flat(out), lse, problem.scale, *problem.lengths,
        num_blocks, problem.size, MODE=problem.mode, num_warps=WARPS,
    )  # fmt: skip
    return out, lse
