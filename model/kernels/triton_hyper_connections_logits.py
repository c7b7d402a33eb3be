"""mHC on a GPU, backward of a read's coefficients: gradients of the logits that make pre, post and comb.

Two kinds of programs in one launch. The first run Sinkhorn again in registers and take its gradient back: all
latency and no bytes, and nothing of it waits for the gradient of pre. The others read the new streams and the
gradient of the layer input (40 KB a token at D 4096 and N 4 in bf16) for the gradient of pre.

Legend as in triton_hyper_connections.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from consilience.model.kernels.triton_hyper_connections import _keep, _load_streams, _soft

CONFIGS: dict[str, dict[str, int]] = {
    "d_logits": {"BLOCK_R": 8, "BLOCK_T": 2, "BLOCK_D": 1024, "num_warps": 4},
}


@triton.jit
def _sinkhorn_backward(d, logits, eps, ROUNDS: tl.constexpr):
    """Gradient of the logits [BLOCK_R, N, N] from that of the balanced matrices.

    A step y = x / t, t = sum x + eps, has dx = (dy - sum(dy · y)) / t. Only the divisors are kept: x = y · t.
    """
    soft = _soft(logits)
    x = soft + eps
    totals = ()
    for step in tl.static_range(2 * ROUNDS - 1):
        total = tl.sum(x, 1 + step % 2, keep_dims=True) + eps
        x = x / total
        totals += (total,)
    for step in tl.static_range(2 * ROUNDS - 2, -1, -1):
        d = (d - tl.sum(d * x, 1 + step % 2, keep_dims=True)) / totals[step]
        x = x * totals[step]
    return soft * (d - tl.sum(d * soft, 2, keep_dims=True))


@triton.jit
def _of_post_and_comb(
    mixes, base, scale, d_post, d_comb, d_logits, first, num_tokens, eps,
    N: tl.constexpr, K: tl.constexpr, ROUNDS: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    row = (first + tl.arange(0, BLOCK_R)).to(tl.int64)
    here = row < num_tokens
    n = tl.arange(0, N)
    place, keep = row[:, None] * K + N + n[None, :], here[:, None]
    mix = tl.load(mixes + place, mask=keep, other=0.0)
    soft = tl.sigmoid(tl.load(scale + 1) * mix + tl.load(base + N + n)[None, :])
    d = tl.load(d_post + row[:, None] * N + n[None, :], mask=keep, other=0.0)
    tl.store(d_logits + place, 2.0 * d * soft * (1.0 - soft), mask=keep)

    pair = n[None, :, None] * N + n[None, None, :]
    place, keep = row[:, None, None] * K + 2 * N + pair, here[:, None, None]
    mix = tl.load(mixes + place, mask=keep, other=0.0)
    d = tl.load(d_comb + row[:, None, None] * (N * N) + pair, mask=keep, other=0.0)
    d = _sinkhorn_backward(d, tl.load(scale + 2) * mix + tl.load(base + 2 * N + pair), eps, ROUNDS)
    tl.store(d_logits + place, d, mask=keep)


@triton.jit
def _of_pre(
    streams, d_input, mixes, base, scale, d_logits, first, num_tokens,
    N: tl.constexpr, D: tl.constexpr, K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = (first + tl.arange(0, BLOCK_T)).to(tl.int64)
    here = row < num_tokens
    sums = ()
    for _ in tl.static_range(N):
        sums += (tl.zeros([BLOCK_T, BLOCK_D], tl.float32),)
    for start in tl.static_range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        keep = _keep(row, d, num_tokens, D, BLOCK_D)
        upstream = tl.load(d_input + row[:, None] * D + d[None, :], mask=keep, other=0.0).to(tl.float32)
        tiles = _load_streams(streams, row[:, None] * (N * D) + d[None, :], keep, N, D)
        added = ()
        for j in tl.static_range(N):
            added += (sums[j] + upstream * tiles[j].to(tl.float32),)
        sums = added
    for j in tl.static_range(N):
        mix = tl.load(mixes + row * K + j, mask=here, other=0.0)
        soft = tl.sigmoid(tl.load(scale) * mix + tl.load(base + j))
        tl.store(d_logits + row * K + j, tl.sum(sums[j], 1) * soft * (1.0 - soft), mask=here)


@triton.jit(do_not_specialize=["num_tokens"])
def _d_logits(
    streams, d_input, mixes, base, scale, d_post, d_comb, d_logits, num_tokens, eps,
    N: tl.constexpr, D: tl.constexpr, K: tl.constexpr, ROUNDS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if ROUNDS > 0:
        num_blocks = tl.cdiv(num_tokens, BLOCK_R)
        if program < num_blocks:
            _of_post_and_comb(
                mixes, base, scale, d_post, d_comb, d_logits, program * BLOCK_R, num_tokens, eps,
                N, K, ROUNDS, BLOCK_R,
            )  # fmt: skip
        program -= num_blocks
    if program >= 0:
        _of_pre(
            streams, d_input, mixes, base, scale, d_logits, program * BLOCK_T, num_tokens,
            N, D, K, BLOCK_T, BLOCK_D,
        )  # fmt: skip


def d_logits(
    streams: Tensor,
    d_input: Tensor,
    mixes: Tensor,
    base: Tensor,
    scale: Tensor,
    d_post: Tensor,
    d_comb: Tensor,
    rounds: int,
    eps: float,
) -> Tensor:
    """Gradient [R, K] fp32 of scale · mixes + base.

    streams [R, N, D] as they were read, d_input [R, D] of the layer input; d_post [R, N] and d_comb [R, N, N]
    are not read if rounds is 0.
    """
    num_tokens, n, width = streams.shape
    found = torch.empty_like(mixes)
    config = CONFIGS["d_logits"]
    num_programs = triton.cdiv(num_tokens, config["BLOCK_T"])
    if rounds > 0:
        num_programs += triton.cdiv(num_tokens, config["BLOCK_R"])
    _d_logits[(num_programs,)](
        streams, d_input, mixes, base, scale, d_post, d_comb, found, num_tokens, eps,
        N=n, D=width, K=mixes.shape[1], ROUNDS=rounds, **config,
    )  # fmt: skip
    return found
