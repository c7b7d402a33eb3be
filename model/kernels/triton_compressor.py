"""Token compression in Triton, forward and backward; twin: model/compressor.py.

A program holds one entry's slots × a block of channels: values and gates are read once, the softmax over the
slots is one of a channel and stays in registers. CSA's 8 slots leave room for all channels of an entry, so
its norm and rotation happen there too (`fused`); HCA's 128 slots are cut by channels, and the norm follows
in a pass over a 128th of the tokens.

Backward: a token's first half of channels belongs to the next window's entry alone and the second half to
its own window's, so each gradient has one writer: no atomics, nothing to gather. What no entry pools keeps
its zero. Gradients of `ape` and of the norm's weight are summed over each program's entries, then over the
programs, both in a fixed order.

Floor: bytes. 4,096 tokens of CSA at width 512 read 67 MB of fp32 projections (0.022 ms at 3 TB/s), at width
128 17 MB (0.006 ms), HCA 34 MB (0.011 ms); the backward reads them again and writes half as much in bf16, on
zeros written before: 2 × as long.

Shapes: R tokens (a state's ring before each row's), E entries, S slots, C channels of an entry, series = 2 C
(CSA) or C channels of a projection, P rotated channel pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from consilience.model.kernels.triton_norm import turned


@dataclass(frozen=True)
class Launch:
    """elements of a tile (slots × channels), elements a thread, programs of the backward of four warps."""

    tile: int
    per_thread: int
    programs: int = 264


LAUNCH = Launch(4096, 32)
FUSED_BELOW = 8192  # elements of an entry's slots × channels, up to which one program holds them all


@dataclass(frozen=True)
class Entries:
    """Where entries come from and go to; every tensor contiguous.

    source [E, S] int64, present [E, S] uint8    as `Closing`
    target [E] int64                             rows of the output
    rotation [*, P, 2] fp32, turn [E] int64      cos and sin; which row of them is an entry's
    """

    source: Tensor
    present: Tensor
    target: Tensor
    rotation: Tensor
    turn: Tensor


@triton.jit
def _slots(
    values, gates, ape, source, present, entry, stride, s, c,
    RATIO: tl.constexpr, SLOTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Weights and values [BLOCK_S, BLOCK_C] of an entry's slots, where they lie, which of them are there."""
    seen = tl.load(present + entry * SLOTS + s, mask=s < SLOTS, other=0) != 0
    row = tl.load(source + entry * SLOTS + s, mask=seen, other=0)
    # CSA: the window's own slots take the second half of the channels.
    half = tl.where(s >= RATIO, WIDTH, 0)
    column = half[:, None] + c[None, :]
    at = row[:, None] * stride + column
    is_channel = (c < WIDTH)[None, :]
    kept = seen[:, None] & is_channel
    bias = ape + (s % RATIO)[:, None] * (SLOTS // RATIO * WIDTH) + column
    g = tl.load(gates + at, mask=kept, other=float("-inf")).to(tl.float32)
    v = tl.load(values + at, mask=kept, other=0.0).to(tl.float32)
    g += tl.load(bias, mask=(s < SLOTS)[:, None] & is_channel, other=0.0)
    g = tl.where(is_channel, g, 0.0)
    p = tl.exp(g - tl.max(g, 0)[None, :])
    return p / tl.sum(p, 0)[None, :], v, at, kept


@triton.jit
def _pool(
    values, gates, ape, source, present, target, weight, rotation, turn, out, stride, eps,
    RATIO: tl.constexpr, SLOTS: tl.constexpr, WIDTH: tl.constexpr, PAIRS: tl.constexpr, FUSED: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    entry = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, BLOCK_S)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    p, v, _, _ = _slots(values, gates, ape, source, present, entry, stride, s, c, RATIO, SLOTS, WIDTH)
    pooled = tl.sum(p * v, 0)[None, :]
    if FUSED:
        w = tl.load(weight + c, mask=c < WIDTH, other=0.0).to(tl.float32)[None, :]
        pooled = pooled * tl.rsqrt(tl.sum(pooled * pooled, 1) / WIDTH + eps)[:, None] * w
        one = tl.arange(0, 1)
        place = tl.load(turn + entry + one).to(tl.int32)
        pooled = turned(pooled, rotation, place, one == 0, 1.0, WIDTH, PAIRS)
    row = tl.load(target + entry)
    tl.store(out + row * WIDTH + c[None, :], pooled.to(out.dtype.element_ty), mask=(c < WIDTH)[None, :])


@triton.jit(do_not_specialize=["num_entries"])
def _pool_backward(
    values, gates, ape, source, present, target, weight, rotation, turn, d_out, d_values, d_gates, d_apes,
    d_weights, num_entries, stride, eps,
    RATIO: tl.constexpr, SLOTS: tl.constexpr, WIDTH: tl.constexpr, PAIRS: tl.constexpr, FUSED: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    s = tl.arange(0, BLOCK_S)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    d_ape = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    d_w = tl.zeros([1, BLOCK_C], tl.float32)
    w = tl.load(weight + c, mask=c < WIDTH, other=0.0).to(tl.float32)[None, :]
    for i in range(tl.cdiv(num_entries - program, programs)):
        entry = program + i * programs
        p, v, at, kept = _slots(
            values, gates, ape, source, present, entry, stride, s, c, RATIO, SLOTS, WIDTH
        )  # fmt: skip
        pooled = tl.sum(p * v, 0)[None, :]
        upstream = d_out + tl.load(target + entry) * WIDTH
        g = tl.load(upstream + c, mask=c < WIDTH, other=0.0).to(tl.float32)
        if FUSED:
            # Turned back; a pair's other half is read again, where `turned` would move registers.
            pair = c // 2 - (WIDTH // 2 - PAIRS)
            is_turned = (pair >= 0) & (c < WIDTH)
            turns = rotation + tl.load(turn + entry) * (2 * PAIRS) + 2 * pair
            cos = tl.load(turns, mask=is_turned, other=1.0)
            sin = tl.load(turns + 1, mask=is_turned, other=0.0)
            other = tl.load(upstream + (c ^ 1), mask=is_turned, other=0.0).to(tl.float32)
            g = g * cos + other * tl.where(c % 2 == 0, sin, -sin)
        g = g[None, :]
        if FUSED:
            scale = tl.rsqrt(tl.sum(pooled * pooled, 1) / WIDTH + eps)[:, None]
            d_w += g * pooled * scale
            g = g * w
            g = scale * (g - pooled * ((tl.sum(g * pooled, 1) / WIDTH)[:, None] * scale * scale))
        d_v = p * g
        d_g = d_v * (v - pooled)
        tl.store(d_values + at, d_v.to(d_values.dtype.element_ty), mask=kept)
        tl.store(d_gates + at, d_g.to(d_gates.dtype.element_ty), mask=kept)
        d_ape += tl.where(kept, d_g, 0.0)
    at = (program * SLOTS + s)[:, None] * WIDTH + c[None, :]
    tl.store(d_apes + at, d_ape, mask=(s < SLOTS)[:, None] & (c < WIDTH)[None, :])
    if FUSED:
        tl.store(d_weights + program * WIDTH + c[None, :], d_w, mask=(c < WIDTH)[None, :])


def is_fused(num_slots: int, width: int) -> bool:
    """Whether one program holds an entry, and `pool` norms and turns it."""
    return triton.next_power_of_2(num_slots) * triton.next_power_of_2(width) <= FUSED_BELOW


def _blocks(num_slots: int, width: int) -> dict[str, int]:
    block_s, block_c = triton.next_power_of_2(num_slots), triton.next_power_of_2(max(width, 2))
    if not is_fused(num_slots, width):
        block_c = min(block_c, max(16, LAUNCH.tile // block_s))
    warps = min(16, max(1, block_s * block_c // (32 * LAUNCH.per_thread)))
    return {"BLOCK_S": block_s, "BLOCK_C": block_c, "num_warps": warps}


def _sizes(entries: Entries, ape: Tensor, width: int) -> dict[str, int | bool]:
    """Compile-time arguments of both kernels."""
    num_slots = entries.source.shape[1]
    sizes = {"RATIO": ape.shape[0], "SLOTS": num_slots, "WIDTH": width}
    fused = is_fused(num_slots, width)
    return sizes | {"PAIRS": entries.rotation.shape[-2], "FUSED": fused, **_blocks(num_slots, width)}


def pool(
    values: Tensor, gates: Tensor, ape: Tensor, weight: Tensor, entries: Entries, eps: float, out: Tensor
) -> None:
    """Fill rows of `out` [*, C] with entries: finished if `is_fused`, else the pooled values alone.

    values, gates [R, series] are columns of one tensor or of two alike; ape [m, series] fp32, weight [C].
    """
    width, count = out.shape[-1], entries.source.shape[0]
    sizes = _sizes(entries, ape, width)
    e = entries
    _pool[count, triton.cdiv(width, sizes["BLOCK_C"])](
        values, gates, ape, e.source, e.present, e.target, weight, e.rotation, e.turn, out,
        values.stride(0), eps, **sizes,
    )  # fmt: skip


def pool_backward(
    values: Tensor,
    gates: Tensor,
    ape: Tensor,
    weight: Tensor,
    entries: Entries,
    eps: float,
    d_out: Tensor,
    d_values: Tensor,
    d_gates: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """d_ape [m, series] and d_weight [C] (None unless `is_fused`), fp32; fills d_values, d_gates [R, series].

    Those have the strides of values and gates, and zeros where no entry pools. d_out [*, C].
    """
    width, (count, num_slots) = d_out.shape[-1], entries.source.shape
    sizes = _sizes(entries, ape, width)
    parts = triton.cdiv(width, sizes["BLOCK_C"])
    programs = LAUNCH.programs * max(1, 4 // int(sizes["num_warps"])) // parts
    programs = max(1, min(count, programs))
    d_apes = d_out.new_empty(programs, num_slots, width, dtype=torch.float32)
    d_weights = d_apes.new_empty(programs if sizes["FUSED"] else 0, width)
    e = entries
    _pool_backward[programs, parts](
        values, gates, ape, e.source, e.present, e.target, weight, e.rotation, e.turn, d_out, d_values,
        d_gates, d_apes, d_weights, count, values.stride(0), eps, **sizes,
    )  # fmt: skip
    # [S, C] -> [m, series]: CSA's earlier slots are the first half of the channels.
    d_ape = torch.cat(d_apes.sum(0).split(ape.shape[0]), dim=1)
    return d_ape, d_weights.sum(0) if sizes["FUSED"] else None
