"""mHC on a GPU, backward of a read's parameters: gradients of fn, base and scale, sums over all tokens.

Gradients of the products fn · x are scaled and cut into two pieces of bfloat16 once, 128 bytes a token,
which every strip reads. A program keeps a strip of the N D columns of `fn` and walks over its group of
tokens: 32 KB a token at D 4096 and N 4 in bf16, and what the groups add. It begins with the last tokens,
whose streams `_d_logits` read last, so that L2 still holds some. Base and scale have programs of their own.

No atomics; neither strips nor groups depend on the number of tokens; groups are added up in a fixed order.

Legend as in triton_hyper_connections.py; G groups of tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from consilience.model.kernels.triton_hyper_connections import _dot, sizes

CONFIGS: dict[str, dict[str, int]] = {
    "d_parameters": {"BLOCK_T": 64, "BLOCK_D": 128, "GROUPS": 3, "num_warps": 4, "num_stages": 3},
}
WIDE = {"BLOCK_T": 32, "BLOCK_D": 32}  # of float32 streams, whose exact products run outside the matrix units
PIECES_T = 32  # tokens of a program that cuts into pieces


class Read(NamedTuple):
    """What a read leaves to its backward: d_input [R, D], pre [R, N], fn [K, N D], d_logits and mixes [R, K],
    inverse norms [R], scale."""

    d_input: Tensor
    pre: Tensor
    fn: Tensor
    d_logits: Tensor
    mixes: Tensor
    inverse: Tensor
    scale: Tensor


@triton.jit
def _factors(scale, c, N: tl.constexpr, K: tl.constexpr):
    """scale of each row of `fn`: [PADDED]."""
    factor = tl.where(c < N, tl.load(scale), 0.0)
    if K > N:
        factor += tl.where((c >= N) & (c < 2 * N), tl.load(scale + 1), 0.0)
        factor += tl.where(c >= 2 * N, tl.load(scale + 2), 0.0)
    return factor


@triton.jit(do_not_specialize=["num_tokens"])
def _cut(
    d_logits, inverse, scale, pieces, num_tokens,
    N: tl.constexpr, K: tl.constexpr, PADDED: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """pieces [R, P, PADDED]: gradients of the products fn · x; in bfloat16 rounded, and what that left."""
    row = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    c, here = tl.arange(0, PADDED), row < num_tokens
    d_logit = tl.load(
        d_logits + row[:, None] * K + c[None, :], mask=here[:, None] & (c < K)[None, :], other=0.0
    )
    inv = tl.load(inverse + row, mask=here, other=0.0)
    raw = d_logit * _factors(scale, c, N, K)[None, :] * inv[:, None]
    IS_WIDE: tl.constexpr = pieces.dtype.element_ty == tl.float32
    place = pieces + row[:, None] * (PADDED if IS_WIDE else 2 * PADDED) + c[None, :]
    tl.store(place, raw.to(pieces.dtype.element_ty), mask=here[:, None])
    if not IS_WIDE:
        left = raw - raw.to(tl.bfloat16).to(tl.float32)
        tl.store(place + PADDED, left.to(tl.bfloat16), mask=here[:, None])


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
    """partial [G, K N D + K + 3]: gradients of fn, then of base and scale, by the first G programs."""
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
            if tile.dtype == tl.float32:
                place = pieces + row[:, None] * PADDED + c[None, :]
                piece = tl.load(place, mask=keep, other=0.0)
                sums = tl.dot(tile, piece, sums, input_precision="ieee")
            else:  # bfloat16, exact in products
                place = pieces + row[:, None] * (2 * PADDED) + c[None, :]
                sums = _dot(tile, tl.load(place, mask=keep, other=0.0), sums)
                sums = _dot(tile, tl.load(place + PADDED, mask=keep, other=0.0), sums)
        partial += group.to(tl.int64) * (K * N * D + K + 3)
        keep = (d < N * D)[:, None] & (c < K)[None, :]
        tl.store(partial + c[None, :] * (N * D) + d[:, None], sums, mask=keep)


def d_parameters(streams: Tensor, read: Read) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of fn [K, N D], base [K] and scale, fp32. streams [R, N, D] as they were read."""
    is_wide = streams.dtype == torch.float32
    config, shape = CONFIGS["d_parameters"] | (WIDE if is_wide else {}), sizes(streams, read.fn)
    num_tokens, num_strips = streams.shape[0], triton.cdiv(read.fn.shape[1], config["BLOCK_D"])
    shares = [read.fn.numel(), read.fn.shape[0], 3]
    partial = read.fn.new_empty(config["GROUPS"], sum(shares))
    pieces = streams.new_empty(num_tokens, 1 if is_wide else 2, shape["PADDED"])
    _cut[(triton.cdiv(num_tokens, PIECES_T),)](
        read.d_logits, read.inverse, read.scale, pieces, num_tokens,
        N=shape["N"], K=shape["K"], PADDED=shape["PADDED"], BLOCK_T=PIECES_T, num_warps=4,
    )  # fmt: skip
    _d_parameters[((num_strips + 1) * config["GROUPS"],)](
        streams, pieces, read.d_logits, read.mixes, partial, num_tokens, **shape, **config
    )
    d_fn, d_base, d_scale = partial.sum(0).split(shares)
    return d_fn.view_as(read.fn), d_base, d_scale[: read.scale.numel()]
