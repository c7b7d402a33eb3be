"""What attention's kernels for Hopper share (Gluon): layouts, what a query sees, copies of keys and queries.

B rows, T queries, H heads, S window keys, M entries, K picks of a query, W window. A block is one query's 64
heads × 512 channels; keys come in tiles of 64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy
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


@gluon.jit
def bounds_of(block, oldest, first, stop, num_queries, num_picks, num_shares, MODE: gl.constexpr):
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
def copy_keys(buffer, window, entries, rows, is_far, batch, num_window, num_entries):
    """A tile's rows of `entries` or of `window`, as one group of copies."""
    c = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, COPIED))
    base = gl.where(is_far, entries, window)
    base += batch.to(gl.int64) * gl.where(is_far, num_entries, num_window) * WIDTH
    async_copy.async_copy_global_to_shared(buffer, base + (rows[:, None] * WIDTH + c[None, :]))
    async_copy.commit_group()


def is_available(problem: Problem) -> bool:
    """Whether these kernels take the call: on Hopper, whole groups of 64 heads, 512 channels in half
    precision, a window of four tiles of 32 keys, entries not by mask."""
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
    """window … sink as these kernels take them: of the picks, 32-bit words, low before high."""
    _, window, entries, picks, *rest = problem.tensors
    entries = entries if problem.num_entries else window  # of one type, whichever is read
    return window, entries, picks.view(torch.int32), *rest
