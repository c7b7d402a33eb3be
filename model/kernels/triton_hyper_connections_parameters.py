"""mHC on a GPU, backward of a read's parameters: gradients of fn, base and scale, sums over all tokens.

A program keeps a strip of the N D columns of `fn` and walks over its group of tokens: 32 KB a token at D 4096
and N 4 in bf16, and what the groups add. It begins with the last tokens, whose streams `_d_logits` read last,
so that L2 still holds some.

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


@triton.jit
def _add_outer(sums, tile, raw):
    """sums + tile' · raw. bfloat16 streams are exact in a product of bfloat16; raw goes in two pieces."""
    if tile.dtype == tl.bfloat16:
        for _ in tl.static_range(2):
            piece = raw.to(tl.bfloat16)
            sums = _dot(tl.trans(tile), piece, sums)
            raw -= piece.to(tl.float32)
    else:
        sums = tl.dot(tl.trans(tile), raw, sums, input_precision="ieee")
    return sums


@triton.jit(do_not_specialize=["num_tokens"])
def _d_parameters(
    streams, d_logits, mixes, inverse, scale, partial, num_tokens,
    N: tl.constexpr, D: tl.constexpr, K: tl.constexpr, PADDED: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """partial [G, K N D + K + 3]: gradients of fn, base and scale from a group of tokens."""
    NUM_STRIPS: tl.constexpr = (N * D + BLOCK_D - 1) // BLOCK_D
    strip, group = tl.program_id(0) % NUM_STRIPS, tl.program_id(0) // NUM_STRIPS
    d, c = strip * BLOCK_D + tl.arange(0, BLOCK_D), tl.arange(0, PADDED)
    factor = _factors(scale, c, N, K)
    num_blocks = tl.cdiv(num_tokens, BLOCK_T)
    sums = tl.zeros([BLOCK_D, PADDED], tl.float32)
    for block in tl.range(group, num_blocks, GROUPS):
        row = ((num_blocks - 1 - block) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
        here = row < num_tokens
        tile_keep = here[:, None] & (d < N * D)[None, :]
        tile = tl.load(streams + row[:, None] * (N * D) + d[None, :], mask=tile_keep, other=0.0)
        keep = here[:, None] & (c < K)[None, :]
        d_logit = tl.load(d_logits + row[:, None] * K + c[None, :], mask=keep, other=0.0)
        inv = tl.load(inverse + row, mask=here, other=0.0)
        sums = _add_outer(sums, tile, d_logit * factor[None, :] * inv[:, None])
    partial += group.to(tl.int64) * (K * N * D + K + 3)
    inside = (d < N * D)[:, None] & (c < K)[None, :]
    tl.store(partial + c[None, :] * (N * D) + d[:, None], sums, mask=inside)
    if strip == 0:
        d_base = tl.zeros([PADDED], tl.float32)
        d_factor = tl.zeros([PADDED], tl.float32)
        for block in tl.range(group, num_blocks, GROUPS):
            row = (block * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
            place, keep = row[:, None] * K + c[None, :], (row < num_tokens)[:, None] & (c < K)[None, :]
            d_logit = tl.load(d_logits + place, mask=keep, other=0.0)
            d_base += tl.sum(d_logit, 0)
            d_factor += tl.sum(d_logit * tl.load(mixes + place, mask=keep, other=0.0), 0)
        partial += K * N * D
        tl.store(partial + c, d_base, mask=c < K)
        tl.store(partial + K, tl.sum(tl.where(c < N, d_factor, 0.0), 0))
        tl.store(partial + K + 1, tl.sum(tl.where((c >= N) & (c < 2 * N), d_factor, 0.0), 0))
        tl.store(partial + K + 2, tl.sum(tl.where(c >= 2 * N, d_factor, 0.0), 0))


def d_parameters(streams: Tensor, read: Read) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of fn [K, N D], base [K] and scale, fp32. streams [R, N, D] as they were read."""
    config = CONFIGS["d_parameters"] | (WIDE if streams.dtype == torch.float32 else {})
    num_strips = triton.cdiv(streams.shape[1] * streams.shape[2], config["BLOCK_D"])
    shares = [read.fn.numel(), read.fn.shape[0], 3]
    partial = read.fn.new_empty(config["GROUPS"], sum(shares))
    _d_parameters[(num_strips * config["GROUPS"],)](
        streams, read.d_logits, read.mixes, read.inverse, read.scale, partial, streams.shape[0],
        **sizes(streams, read.fn), **config,
    )  # fmt: skip
    d_fn, d_base, d_scale = partial.sum(0).split(shares)
    return d_fn.view_as(read.fn), d_base, d_scale[: read.scale.numel()]
