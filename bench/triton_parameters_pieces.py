"""A candidate for mHC's `d_parameters`: the same sums, with all that a strip repeats done once before.

The chosen kernel scales a block's gradients, cuts them into two pieces of bfloat16 and puts both through
shared memory in each of 128 strips; its first strip's programs then walk all tokens a second time, alone,
for base and scale. Here `_pieces` writes the pieces once (128 bytes a token), so that a strip's loop is
three copies that run ahead and two products, and base and scale have programs of their own that start
first. fn's gradient sums the same products in the same order: the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from consilience.model.kernels import triton_hyper_connections_parameters as chosen
from consilience.model.kernels.triton_hyper_connections import _dot, sizes
from consilience.model.kernels.triton_hyper_connections_parameters import Read, _factors

CONFIG = {"BLOCK_T": 64, "BLOCK_D": 128, "GROUPS": 3, "num_warps": 4, "num_stages": 3}


@triton.jit(do_not_specialize=["num_tokens"])
def _pieces(
    d_logits, inverse, scale, pieces, num_tokens,
    N: tl.constexpr, K: tl.constexpr, PADDED: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """pieces [R, 2, PADDED]: gradients of the products fn · x, rounded, and what that left."""
    row = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    c, here = tl.arange(0, PADDED), row < num_tokens
    d_logit = tl.load(
        d_logits + row[:, None] * K + c[None, :], mask=here[:, None] & (c < K)[None, :], other=0.0
    )
    inv = tl.load(inverse + row, mask=here, other=0.0)
    raw = d_logit * _factors(scale, c, N, K)[None, :] * inv[:, None]
    place = pieces + row[:, None] * (2 * PADDED) + c[None, :]
    large = raw.to(tl.bfloat16)
    tl.store(place, large, mask=here[:, None])
    tl.store(place + PADDED, (raw - large.to(tl.float32)).to(tl.bfloat16), mask=here[:, None])


@triton.jit
def _base_and_scale(
    d_logits, mixes, partial, group, num_tokens,
    N: tl.constexpr, K: tl.constexpr, PADDED: tl.constexpr, GROUPS: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    c = tl.arange(0, PADDED)
    d_base = tl.zeros([PADDED], tl.float32)
    d_factor = tl.zeros([PADDED], tl.float32)
    for block in tl.range(group, tl.cdiv(num_tokens, BLOCK_T), GROUPS):
        row = (block * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
        place, keep = row[:, None] * K + c[None, :], (row < num_tokens)[:, None] & (c < K)[None, :]
        d_logit = tl.load(d_logits + place, mask=keep, other=0.0)
        d_base += tl.sum(d_logit, 0)
        d_factor += tl.sum(d_logit * tl.load(mixes + place, mask=keep, other=0.0), 0)
    tl.store(partial + c, d_base, mask=c < K)
    tl.store(partial + K, tl.sum(tl.where(c < N, d_factor, 0.0), 0))
    tl.store(partial + K + 1, tl.sum(tl.where((c >= N) & (c < 2 * N), d_factor, 0.0), 0))
    tl.store(partial + K + 2, tl.sum(tl.where(c >= 2 * N, d_factor, 0.0), 0))


@triton.jit(do_not_specialize=["num_tokens"])
def _d_parameters(
    streams, pieces, d_logits, mixes, partial, num_tokens,
    N: tl.constexpr, D: tl.constexpr, K: tl.constexpr, PADDED: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """partial [G, K N D + K + 3] as the chosen kernel's; the first G programs make what follows fn's part."""
    NUM_STRIPS: tl.constexpr = (N * D + BLOCK_D - 1) // BLOCK_D
    program = tl.program_id(0)
    if program < GROUPS:
        own = partial + program.to(tl.int64) * (K * N * D + K + 3) + K * N * D
        _base_and_scale(d_logits, mixes, own, program, num_tokens, N, K, PADDED, GROUPS, BLOCK_T)
    else:
        strip, group = (program - GROUPS) % NUM_STRIPS, (program - GROUPS) // NUM_STRIPS
        d, c = strip * BLOCK_D + tl.arange(0, BLOCK_D), tl.arange(0, PADDED)
        num_blocks = tl.cdiv(num_tokens, BLOCK_T)
        sums = tl.zeros([BLOCK_D, PADDED], tl.float32)
        for block in tl.range(group, num_blocks, GROUPS):
            row = ((num_blocks - 1 - block) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
            keep = (row < num_tokens)[:, None]
            inside = keep
            if N * D % BLOCK_D != 0:
                inside = keep & (d < N * D)[None, :]
            tile = tl.trans(tl.load(streams + row[:, None] * (N * D) + d[None, :], mask=inside, other=0.0))
            place = pieces + row[:, None] * (2 * PADDED) + c[None, :]
            sums = _dot(tile, tl.load(place, mask=keep, other=0.0), sums)
            sums = _dot(tile, tl.load(place + PADDED, mask=keep, other=0.0), sums)
        partial += group.to(tl.int64) * (K * N * D + K + 3)
        keep = (d < N * D)[:, None] & (c < K)[None, :]
        tl.store(partial + c[None, :] * (N * D) + d[:, None], sums, mask=keep)


def d_parameters(streams: Tensor, read: Read) -> tuple[Tensor, Tensor, Tensor]:
    """As the chosen `d_parameters`, which takes float32 streams."""
    if streams.dtype != torch.bfloat16:
        return chosen.d_parameters(streams, read)
    shape, num_tokens = sizes(streams, read.fn), streams.shape[0]
    num_strips = triton.cdiv(streams.shape[1] * streams.shape[2], CONFIG["BLOCK_D"])
    shares = [read.fn.numel(), read.fn.shape[0], 3]
    partial = read.fn.new_empty(CONFIG["GROUPS"], sum(shares))
    pieces = streams.new_empty(num_tokens, 2, shape["PADDED"])
    _pieces[(triton.cdiv(num_tokens, 32),)](
        read.d_logits, read.inverse, read.scale, pieces, num_tokens,
        N=shape["N"], K=shape["K"], PADDED=shape["PADDED"], BLOCK_T=32, num_warps=4,
    )  # fmt: skip
    _d_parameters[((num_strips + 1) * CONFIG["GROUPS"],)](
        streams, pieces, read.d_logits, read.mixes, partial, num_tokens, **shape, **CONFIG
    )
    d_fn, d_base, d_scale = partial.sum(0).split(shares)
    return d_fn.view_as(read.fn), d_base, d_scale[: read.scale.numel()]
