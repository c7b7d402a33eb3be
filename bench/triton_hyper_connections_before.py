"""mHC's first backward in Triton, for bench/hyper_connections_gpu.py to compare with: 192 KB a token, 472 us
for 4,096 tokens at width 4,096 on an H100. Delete it once the new one has been measured."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from consilience.model.kernels.triton_hyper_connections import (
    INTERPRETED,
    SPLIT,
    _keep,
    _load_columns,
    _load_streams,
    _soft,
    _total,
    _written,
    sizes,
)

CONFIGS: dict[str, dict[str, int]] = {
    "d_pre": {"BLOCK_T": 2, "BLOCK_D": 1024, "num_warps": 4},
    "d_mixes": {"BLOCK_T": 16, "num_warps": 2},
    "d_streams": {"BLOCK_T": 16, "BLOCK_D": 64, "num_warps": 4, "num_stages": 1},
    "sum_columns": {"BLOCK_T": 128, "num_warps": 4},
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
        totals += (total,)
    for step in tl.static_range(2 * ROUNDS - 2, -1, -1):
        d = (d - tl.sum(d * x, 1 + step % 2, keep_dims=True)) / totals[step]
        x = x * totals[step]
    return soft * (d - tl.sum(d * soft, 2, keep_dims=True))


@triton.jit(do_not_specialize=["num_tokens"])
def _d_mixes(
    mixes, inverse, base, scale, d_pre, d_post, d_comb, d_raw, d_norm, parameters, num_tokens, eps,
    N: tl.constexpr, D: tl.constexpr, K: tl.constexpr, ROUNDS: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """d_raw [R, K]: gradient of the products fn · x; d_norm [R]: x's factor in its gradient by the norm."""
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
    """a [BLOCK_T, PADDED] · weight [PADDED, BLOCK_D] to an eighth of bfloat16's last bit if that is dtype."""
    if dtype == tl.bfloat16 and not INTERPRETED:
        product = tl.dot(a, weight, input_precision="tf32")
    else:
        product = tl.dot(a, weight, input_precision="ieee")
    # Loosened from the product's layout, which Triton would take for everything that is added to it.
    product, _ = tl.split(tl.join(product, product))
    return product


@triton.jit(do_not_specialize=["num_tokens"])
def _d_streams(
    streams, output, post, comb, d_written, d_input, pre, fn, d_raw, d_norm,
    d_streams, d_output, partial, num_tokens,
    N: tl.constexpr, D: tl.constexpr, K: tl.constexpr, PADDED: tl.constexpr, WIDTH: tl.constexpr,
    HAS_WRITE: tl.constexpr, HAS_READ: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """partial [S, N + N·N, R]: gradients of post and comb from the columns of a split."""
    NUM_SPLITS: tl.constexpr = (D + WIDTH - 1) // WIDTH
    dtype: tl.constexpr = streams.dtype.element_ty
    split = tl.program_id(0) % NUM_SPLITS
    row = (tl.program_id(0) // NUM_SPLITS * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    here = row < num_tokens
    c = tl.arange(0, PADDED)
    d_columns = ()
    if HAS_WRITE:
        posts = _load_columns(post, row, here, N)
        combs = _load_columns(comb, row, here, N * N)
        for _ in tl.static_range(N + N * N):
            d_columns += (tl.zeros([BLOCK_T], tl.float32),)
    if HAS_READ:
        pres = _load_columns(pre, row, here, N)
        through_norm = tl.load(d_norm + row, mask=here, other=0.0)
        raw_keep = here[:, None] & (c < K)[None, :]
        raw = tl.load(d_raw + row[:, None] * K + c[None, :], mask=raw_keep, other=0.0)
    for start in tl.range(0, WIDTH, BLOCK_D):
        d = split * WIDTH + start + tl.arange(0, BLOCK_D)
        keep = _keep(row, d, num_tokens, D, WIDTH)
        offset = row[:, None] * (N * D) + d[None, :]
        flat = row[:, None] * D + d[None, :]
        tiles = _load_streams(streams, offset, keep, N, D)
        if HAS_WRITE:
            upstreams = _load_streams(d_written, offset, keep, N, D)
            added = tl.load(output + flat, mask=keep, other=0.0)
            d_added = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
            d_tiles = ()
            for _ in tl.static_range(N):
                d_tiles += (tl.zeros([BLOCK_T, BLOCK_D], tl.float32),)
        for k in tl.static_range(N):
            g = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
            if HAS_READ:
                tile = tiles[k]
                if HAS_WRITE:
                    tile = _written(tiles, added, posts, combs, k, N)
                weight = tl.load(
                    fn + c[:, None] * (N * D) + k * D + d[None, :],
                    mask=(c < K)[:, None] & (d < D)[None, :],
                    other=0.0,
                )
                product = _product(raw, weight, dtype)
                # Loaded after the product: Triton takes the layout of what comes last for their sum.
                arrived = tl.load(d_input + flat, mask=keep, other=0.0).to(tl.float32)
                g = pres[k][:, None] * arrived + through_norm[:, None] * tile.to(tl.float32) + product
            if HAS_WRITE:
                g += upstreams[k].to(tl.float32)
                d_added += posts[k][:, None] * g
                d_tiles = _add_to_each(d_tiles, combs, g, k, N)
                d_columns = _add_columns(d_columns, tiles, added, g, k, N)
            else:
                tl.store(d_streams + offset + k * D, g.to(dtype), mask=keep)
        if HAS_WRITE:
            tl.store(d_output + flat, d_added.to(dtype), mask=keep)
            for j in tl.static_range(N):
                tl.store(d_streams + offset + j * D, d_tiles[j].to(dtype), mask=keep)
    if HAS_WRITE:
        place = split * (N + N * N) * num_tokens.to(tl.int64) + row
        for column in tl.static_range(N + N * N):
            tl.store(partial + place + column * num_tokens.to(tl.int64), d_columns[column], mask=here)


@triton.jit
def _add_to_each(d_tiles, combs, g, k: tl.constexpr, N: tl.constexpr):
    """d_tiles_j + comb[j, k] · g."""
    more = ()
    for j in tl.static_range(N):
        more += (d_tiles[j] + combs[j * N + k][:, None] * g,)
    return more


@triton.jit
def _add_columns(d_columns, tiles, added, g, k: tl.constexpr, N: tl.constexpr):
    """The columns [post N | comb N·N] with the sums over a tile of g · o for post_k and g · X_j for comb[j,
    k]."""
    more = ()
    for column in tl.static_range(N + N * N):
        total = d_columns[column]
        if column == k:
            total += tl.sum(g * added.to(tl.float32), 1)
        elif column >= N and column % N == k:
            total += tl.sum(g * tiles[column // N - 1].to(tl.float32), 1)
        more += (total,)
    return more


@triton.jit(do_not_specialize=["num_tokens"])
def _sum_columns(
    partial, d_post, d_comb, num_tokens, N: tl.constexpr, NUM_SPLITS: tl.constexpr, BLOCK_T: tl.constexpr
):
    COUNT: tl.constexpr = N + N * N
    column = tl.program_id(0) % COUNT
    row = (tl.program_id(0) // COUNT * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    here = row < num_tokens
    num = num_tokens.to(tl.int64)
    total = _total(partial, column * num + row, here, COUNT * num, NUM_SPLITS)
    if column < N:
        tl.store(d_post + row * N + column, total, mask=here)
    else:
        tl.store(d_comb + row * (N * N) + column - N, total, mask=here)


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
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of streams [R, N, D], output [R, D], post [R, N] and comb [R, N, N]; the last three None if
    nothing was written.

    streams: before the write. written: output, post, comb and the gradient of the new streams from elsewhere
    than the read. read: the gradient of the layer input, pre, fn, d_raw, d_norm; None: nothing was read.
    """
    num_tokens, n, width = streams.shape
    config = CONFIGS["d_streams"]
    num_splits = triton.cdiv(width, SPLIT)
    d_output = partial = None
    found = torch.empty_like(streams)
    if written is not None:
        d_output = torch.empty_like(written[0])
        partial = found.new_empty(num_splits, n + n * n, num_tokens, dtype=torch.float32)
    output, post, comb, d_written = written or (None,) * 4
    d_input, pre, fn, d_raw, d_norm = read or (None,) * 5
    _d_streams[(triton.cdiv(num_tokens, config["BLOCK_T"]) * num_splits,)](
        streams, output, post, comb, d_written, d_input, pre, fn, d_raw, d_norm,
        found, d_output, partial, num_tokens,
        **sizes(streams, fn), WIDTH=SPLIT, HAS_WRITE=written is not None, HAS_READ=read is not None, **config,
    )  # fmt: skip
    if written is None or partial is None:
        return found, None, None, None
    d_post, d_comb = torch.empty_like(written[1]), torch.empty_like(written[2])
    config = CONFIGS["sum_columns"]
    _sum_columns[(triton.cdiv(num_tokens, config["BLOCK_T"]) * (n + n * n),)](
        partial, d_post, d_comb, num_tokens, N=n, NUM_SPLITS=num_splits, **config
    )
    return found, d_output, d_post, d_comb


def d_fn(streams: Tensor, d_raw: Tensor) -> Tensor:
    """Gradient of `fn` [K, N D] fp32: d_raw' · streams, over all tokens.

    For bfloat16 streams d_raw goes in two pieces, so that the product is a bfloat16 one with fp32 sums.
    """
    flat = streams.flatten(1)
    if streams.dtype == torch.float32:
        return d_raw.t() @ flat
    high = d_raw.bfloat16()
    pieces = torch.cat((high, (d_raw - high).bfloat16()), 1).t()
    if flat.is_cuda:
        both = torch.mm(pieces, flat, out_dtype=torch.float32)
    else:
        both = pieces.float() @ flat.float()
    return both[: d_raw.shape[1]] + both[d_raw.shape[1] :]
