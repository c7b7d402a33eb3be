"""Sums of numbers as integers, whose bits do not depend on the order of the additions (Triton).

A power of two scales a number before it is rounded to an integer of 31 bits; two of them ride in one of 64.
Two sums are served together, with a scale each: [2] scales, and [2] largest numbers as the bits of fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def choose(largest, scales, is_needed, near_limit, far_limit, near_room, far_room, IS_CHECK: tl.constexpr):
    """Powers of two by which parts of keys and of entries are multiplied: the largest found, `room` times, is
    at most the limit. A check, by the largest of all, changes what does not fit, and says so."""
    index = tl.arange(0, 2)
    limit, room = tl.where(index == 0, near_limit, far_limit), tl.where(index == 0, near_room, far_room)
    top = tl.load(largest + index).to(tl.float32, bitcast=True)
    fitting = limit / (top * (1.0 if IS_CHECK else room))
    fitting = (fitting.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    fitting = tl.where((fitting > 0) & (fitting < float("inf")), fitting, 1.0)
    if IS_CHECK:
        before = tl.load(scales + index)
        # Too small is only what was not measured at all.
        is_wrong = (top * before > limit) | (fitting > 2 * room * before)
        is_wrong &= top > 0
        is_needed_again = tl.max(is_wrong.to(tl.int32), 0)
        tl.store(is_needed, is_needed_again)
        fitting = tl.where(is_needed_again > 0, fitting, before)
    tl.store(scales + index, fitting)


@triton.jit
def clear(sums, num_pairs, is_needed, BLOCK: tl.constexpr):
    """Zeros, where the sums are made again."""
    if tl.load(is_needed) != 0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        tl.store(sums + at, tl.zeros([BLOCK], tl.int64), mask=at < num_pairs)


@triton.jit
def unpack(
    sums, scales, largest, gradient, num_pairs,
    INDEX: tl.constexpr, ADDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of pairs as gradients, or added to them; NaN all over where a part was not finite."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    both = tl.load(sums + at, mask=at < num_pairs, other=0)
    low = both.to(tl.int32)
    high = ((both - low.to(tl.int64)) >> 32).to(tl.int32)
    back = 1.0 / tl.load(scales + INDEX)
    back = tl.where(tl.load(largest + INDEX) >= 0x7F800000, float("nan"), back)
    values = tl.join(low.to(tl.float32) * back, high.to(tl.float32) * back)
    target = gradient + 2 * at[:, None] + tl.arange(0, 2)[None, :]
    is_there = (at < num_pairs)[:, None]
    if ADDS:
        values += tl.load(target, mask=is_there, other=0.0)
    tl.store(target, values, mask=is_there)
