"""mHC on a GPU, backward of triton_hyper_connections.py.

Four kernels. `_d_pre` reads the streams and the layer input's gradient; `_d_mixes` makes the gradient of the
projection from it, with Sinkhorn run again in registers; `_d_streams` does the rest in one pass: it rebuilds the
new streams from the old ones, forms their gradient, and takes it back through the write, with partial sums of the
gradients of `fn` (over the tokens of a part), post and comb (over the columns of a block); torch adds those up, in
a fixed order. 40 + 120 KB a token at D 4096 and N 4 in bf16: 218 us for 4,096 tokens at 3 TB/s, with partial sums
and 85 % of the rate about 275 us are expected. The 120 KB alone would need pre's gradient before anything is read.

Legend as in triton_hyper_connections.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from consilience.model.kernels.triton_hyper_connections import (
    INTERPRETED,
    _dot,
    _keep,
    _load_columns,
    _load_streams,
    _soft,
    _written,
    sizes,
)

NUM_PARTS = 4  # at most so many partial gradients of `fn`, each of at least PART tokens
PART = 256
CONFIGS: dict[str, dict[str, int]] = {
    "d_pre": {"BLOCK_T": 2, "BLOCK_D": 1024, "num_warps": 4},
    "d_mixes": {"BLOCK_T": 32, "num_warps": 4},
    "d_streams": {"BLOCK_T": 16, "BLOCK_D": 64, "num_warps": 4, "num_stages": 2},
}


@triton.jit(do_not_specialize=["num_tokens"])
def _d_pre(
    streams, d_input, d_pre, num_tokens,
    N: tl.constexpr, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    here = row < num_tokens
    sums = ()
    for _ in tl.static_range(N):
        sums = sums + (tl.zeros([BLOCK_T, BLOCK_D], tl.float32),)
    for start in tl.static_range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        keep = _keep(row, d, num_tokens, D, BLOCK_D)
        upstream = tl.load(d_input + row[:, None] * D + d[None, :], mask=keep, other=0.0).to(tl.float32)
        tiles = _load_streams(streams, row[:, None] * (N * D) + d[None, :], keep, N, D)
        added = ()
        for j in tl.static_range(N):
            added = added + (sums[j] + upstream * tiles[j].to(tl.float32),)
        sums = added
    for j in tl.static_range(N):
        tl.store(d_pre + row * N + j, tl.sum(sums[j], 1), mask=here)


@triton.jit
def _sinkhorn_backward(d, logits, eps, ROUNDS: tl.constexpr):
    """Gradient of the logits [BLOCK_T, N, N] from that of the balanced matrices.

    A step y = x / t, t = sum x + eps, has dx = (dy - sum(dy · y)) / t. Only the divisors are kept: x = y · t.
    """
    soft = _soft(logits)
    x = soft + eps
    totals = ()
    for step in tl.static_range(2 * ROUNDS - 1):
        total = tl.sum(x, 1 + step % 2, keep_dims=True) + eps
        x = x / total
        totals = totals + (total,)
    for back in tl.static_range(2 * ROUNDS - 1):
        step: tl.constexpr = 2 * ROUNDS - 2 - back
        d = (d - tl.sum(d * x, 1 + step % 2, keep_dims=True)) / totals[step]
        x = x * totals[step]
    return soft * (d - tl.sum(d * soft, 2, keep_dims=True))


@triton.jit(do_not_specialize=["num_tokens"])
def _d_mixes(
    mixes, inverse, base, scale, d_pre, d_post, d_comb, d_raw, d_norm, parameters, num_tokens, eps,
    N: tl.constexpr, D: tl.constexpr, K: tl.constexpr, ROUNDS: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """d_raw [R, K]: gradient of the products fn · x; d_norm [R]: x's factor in its gradient through the norm."""
    row = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    here = row < num_tokens
    n = tl.arange(0, N)
    inv = tl.load(inverse + row, mask=here, other=0.0)
    # One row of gradients of [base | scale] for each program.
    parameters += tl.program_id(0) * (K + 3)

    place, keep = row[:, None] * K + n[None, :], here[:, None]
    out = row[:, None] * N + n[None, :]
    mix = tl.load(mixes + place, mask=keep, other=0.0)
    factor = tl.load(scale)
    soft = tl.sigmoid(factor * mix + tl.load(base + n)[None, :])
    d = tl.load(d_pre + out, mask=keep, other=0.0) * soft * (1.0 - soft)
    inner = tl.sum(d * mix, 1)
    tl.store(parameters + n, tl.sum(d, 0))
    tl.store(parameters + K, tl.sum(inner, 0))
    inner *= factor
    tl.store(d_raw + place, factor * d * inv[:, None], mask=keep)
    if ROUNDS > 0:
        place += N
        mix = tl.load(mixes + place, mask=keep, other=0.0)
        factor = tl.load(scale + 1)
        soft = tl.sigmoid(factor * mix + tl.load(base + N + n)[None, :])
        d = 2.0 * tl.load(d_post + out, mask=keep, other=0.0) * soft * (1.0 - soft)
        product = tl.sum(d * mix, 1)
        tl.store(parameters + N + n, tl.sum(d, 0))
        tl.store(parameters + K + 1, tl.sum(product, 0))
        inner += factor * product
        tl.store(d_raw + place, factor * d * inv[:, None], mask=keep)

        pair = n[None, :, None] * N + n[None, None, :]
        place3, keep3 = row[:, None, None] * K + 2 * N + pair, here[:, None, None]
        mix3 = tl.load(mixes + place3, mask=keep3, other=0.0)
        factor = tl.load(scale + 2)
        d3 = tl.load(d_comb + row[:, None, None] * (N * N) + pair, mask=keep3, other=0.0)
        d3 = _sinkhorn_backward(d3, factor * mix3 + tl.load(base + 2 * N + pair), eps, ROUNDS)
        product = tl.sum(tl.sum(d3 * mix3, 2), 1)
        square = n[:, None] * N + n[None, :]
        tl.store(parameters + 2 * N + square, tl.sum(d3, 0))
        tl.store(parameters + K + 2, tl.sum(product, 0))
        inner += factor * product
        tl.store(d_raw + place3, factor * d3 * inv[:, None, None], mask=keep3)
    # m = raw · inv and inv = (mean x² + eps)^-1/2: dx = -sum(dm · m) inv² / (N D) · x
    tl.store(d_norm + row, -inner * inv * inv / (N * D), mask=here)


@triton.jit
def _product(a, weight, dtype: tl.constexpr):
    """a [BLOCK_T, PADDED] · weight [PADDED, BLOCK_D], rounded to less than bfloat16's last bit if that is dtype."""
    if dtype == tl.bfloat16 and not INTERPRETED:
        product = tl.dot(a, weight, input_precision="tf32")
    else:
        product = tl.dot(a, weight, input_precision="ieee")
    return product


@triton.jit
def _add_outer(sums, a, x):
    """sums + a · x for fp32 a [PADDED, BLOCK_T] in two pieces of bfloat16 where x [BLOCK_T, BLOCK_D] is such."""
    if x.dtype == tl.bfloat16:
        high = a.to(tl.bfloat16)
        sums = _dot(high, x, sums)
        sums = _dot((a - high.to(tl.float32)).to(tl.bfloat16), x, sums)
    else:
        sums = tl.dot(a, x, sums, input_precision="ieee")
    return sums


@triton.jit(do_not_specialize=["num_tokens", "part_size"])
def _d_streams(
    streams, output, post, comb, d_written, d_input, pre, fn, d_raw, d_norm,
    d_streams, d_output, d_columns, d_fn, num_tokens, part_size,
    N: tl.constexpr, D: tl.constexpr, K: tl.constexpr, PADDED: tl.constexpr,
    HAS_WRITE: tl.constexpr, HAS_READ: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    NUM_BLOCKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    dtype: tl.constexpr = streams.dtype.element_ty
    block = tl.program_id(0) % NUM_BLOCKS
    part = tl.program_id(0) // NUM_BLOCKS
    d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    c = tl.arange(0, PADDED)
    weight_keep = (c < K)[:, None] & (d < D)[None, :]
    weight_place = c[:, None] * (N * D) + d[None, :]
    stride = num_tokens.to(tl.int64)
    if HAS_WRITE:
        d_columns += block * (N + N * N) * stride
    d_fns = ()
    for _ in tl.static_range(N):
        d_fns = d_fns + (tl.zeros([PADDED, BLOCK_D], tl.float32),)
    last = tl.minimum((part + 1) * part_size, num_tokens)
    for start in tl.range(part * part_size, last, BLOCK_T):
        row = (start + tl.arange(0, BLOCK_T)).to(tl.int64)
        here = row < num_tokens
        keep = _keep(row, d, num_tokens, D, BLOCK_D)
        offset = row[:, None] * (N * D) + d[None, :]
        flat = row[:, None] * D + d[None, :]
        tiles = _load_streams(streams, offset, keep, N, D)
        if HAS_WRITE:
            upstreams = _load_streams(d_written, offset, keep, N, D)
            posts = _load_columns(post, row, here, N)
            combs = _load_columns(comb, row, here, N * N)
            added = tl.load(output + flat, mask=keep, other=0.0)
            d_added = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
            d_tiles = ()
            for _ in tl.static_range(N):
                d_tiles = d_tiles + (tl.zeros([BLOCK_T, BLOCK_D], tl.float32),)
        if HAS_READ:
            arrived = tl.load(d_input + flat, mask=keep, other=0.0).to(tl.float32)
            pres = _load_columns(pre, row, here, N)
            through_norm = tl.load(d_norm + row, mask=here, other=0.0)
            raw_keep = here[:, None] & (c < K)[None, :]
            raw = tl.load(d_raw + row[:, None] * K + c[None, :], mask=raw_keep, other=0.0)
            more_fns = ()
        for k in tl.static_range(N):
            if HAS_READ:
                tile = tiles[k]
                if HAS_WRITE:
                    tile = _written(tiles, added, posts, combs, k, N)
                more_fns = more_fns + (_add_outer(d_fns[k], tl.trans(raw), tile),)
                weight = tl.load(fn + weight_place + k * D, mask=weight_keep, other=0.0)
                g = _product(raw, weight, dtype)
                g += pres[k][:, None] * arrived + through_norm[:, None] * tile.to(tl.float32)
                if HAS_WRITE:
                    g += upstreams[k].to(tl.float32)
            else:
                g = upstreams[k].to(tl.float32)
            if HAS_WRITE:
                d_added += posts[k][:, None] * g
                tl.store(d_columns + k * stride + row, tl.sum(g * added.to(tl.float32), 1), mask=here)
                more_tiles = ()
                for j in tl.static_range(N):
                    more_tiles = more_tiles + (d_tiles[j] + combs[j * N + k][:, None] * g,)
                    pair = (N + j * N + k) * stride
                    tl.store(d_columns + pair + row, tl.sum(g * tiles[j].to(tl.float32), 1), mask=here)
                d_tiles = more_tiles
            else:
                tl.store(d_streams + offset + k * D, g.to(dtype), mask=keep)
        if HAS_READ:
            d_fns = more_fns
        if HAS_WRITE:
            tl.store(d_output + flat, d_added.to(dtype), mask=keep)
            for j in tl.static_range(N):
                tl.store(d_streams + offset + j * D, d_tiles[j].to(dtype), mask=keep)
    if HAS_READ:
        d_fn += part * K * (N * D)
        for k in tl.static_range(N):
            tl.store(d_fn + weight_place + k * D, d_fns[k], mask=weight_keep)


def d_pre(streams: Tensor, d_input: Tensor) -> Tensor:
    """Gradient of the weights of a read [R, N] from that of what it read [R, D]."""
    num_tokens, n, width = streams.shape
    found = streams.new_empty(num_tokens, n, dtype=torch.float32)
    config = CONFIGS["d_pre"]
    grid = (triton.cdiv(num_tokens, config["BLOCK_T"]),)
    _d_pre[grid](streams, d_input, found, num_tokens, N=n, D=width, **config)
    return found


def d_mixes(
    mixes: Tensor,
    inverse: Tensor,
    base: Tensor,
    scale: Tensor,
    gradients: tuple[Tensor, Tensor, Tensor],
    width: int,
    rounds: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """d_raw [R, K] and d_norm [R] as in `_d_mixes`, d_base, d_scale.

    gradients: of pre [R, N], post [R, N] and comb [R, N, N]; the last two are not read if rounds is 0.
    """
    num_tokens, num_rows = mixes.shape
    config = CONFIGS["d_mixes"]
    num_programs = triton.cdiv(num_tokens, config["BLOCK_T"])
    d_raw, d_norm = torch.empty_like(mixes), torch.empty_like(inverse)
    parameters = mixes.new_empty(num_programs, num_rows + 3)
    _d_mixes[(num_programs,)](
        mixes, inverse, base, scale, *gradients, d_raw, d_norm, parameters, num_tokens, eps,
        N=gradients[0].shape[1], D=width, K=num_rows, ROUNDS=rounds, **config,
    )  # fmt: skip
    total = parameters.sum(0)
    return d_raw, d_norm, total[:num_rows], total[num_rows : num_rows + scale.numel()]


def d_streams(
    streams: Tensor, written: tuple[Tensor, ...] | None, read: tuple[Tensor, ...] | None
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of streams [R, N, D], output [R, D], post [R, N], comb [R, N, N], fn [K, N D].

    streams: before the write. written: output, post, comb and the gradient of the new streams from elsewhere
    than the read; None: nothing was written. read: the gradient of the layer input, pre, fn, d_raw, d_norm; None:
    nothing was read. What has no gradient is None.
    """
    num_tokens, n, width = streams.shape
    config = CONFIGS["d_streams"]
    shared = sizes(streams, None if read is None else read[2])
    num_blocks = triton.cdiv(width, config["BLOCK_D"])
    num_parts, part_size = 1, num_tokens
    d_output = columns = d_fn = None
    found = torch.empty_like(streams)
    if written is not None:
        d_output = torch.empty_like(written[0])
        columns = found.new_empty(num_blocks, n + n * n, num_tokens, dtype=torch.float32)
    num_parts = max(1, min(NUM_PARTS, num_tokens // PART))
    part_size = triton.cdiv(triton.cdiv(num_tokens, num_parts), config["BLOCK_T"]) * config["BLOCK_T"]
    if read is not None:
        d_fn = found.new_empty(num_parts, shared["K"], n * width, dtype=torch.float32)
    output, post, comb, d_written = written or (None,) * 4
    d_input, pre, fn, d_raw, d_norm = read or (None,) * 5
    _d_streams[(num_blocks * num_parts,)](
        streams, output, post, comb, d_written, d_input, pre, fn, d_raw, d_norm,
        found, d_output, columns, d_fn, num_tokens, part_size,
        **shared, HAS_WRITE=written is not None, HAS_READ=read is not None, **config,
    )  # fmt: skip
    d_post = d_comb = None
    if columns is not None:
        total = columns.sum(0).t()
        d_post, d_comb = total[:, :n].contiguous(), total[:, n:].reshape(num_tokens, n, n)
    return found, d_output, d_post, d_comb, None if d_fn is None else d_fn.sum(0)
