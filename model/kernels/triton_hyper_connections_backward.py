"""mHC on a GPU, backward of triton_hyper_connections.py: gradients of streams and output, of post and comb.

`_d_streams` reads old streams, output and the gradients of new streams and layer input once, rebuilds the new
streams, forms their gradient and takes it back through the write: 120 KB a token at D 4096 and N 4 in bf16,
and 2.6 KB of partial sums that `_sum_columns` adds up. Before it runs triton_hyper_connections_logits.py (40
KB; the gradient of pre depends on whole rows), beside it triton_hyper_connections_parameters.py (32 KB). 195
KB: 266 us for 4,096 tokens at 3 TB/s, about 310 us expected.

The 120 KB alone would need the gradient of pre before anything is read, and the sums over tokens for `fn`
beside the sums over columns for post and comb. One program for both walks over tokens with a strip of the
width: its share of the gradient of `fn` (32 to 64 registers a thread) leaves 8 warps to a multiprocessor.

No atomics. Partial sums over columns are added up in a fixed order.

Legend as in triton_hyper_connections.py, S splits of D.
"""

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
    _total,
    _written,
    sizes,
)
from consilience.model.kernels.triton_hyper_connections_parameters import Read, _factors

CONFIGS: dict[str, dict[str, int]] = {
    "d_streams": {"BLOCK_T": 16, "BLOCK_D": 64, "num_warps": 4, "num_stages": 2, "maxnreg": 168},
    "sum_columns": {"BLOCK_T": 16, "num_warps": 4},
}
LANE = 8  # columns of a token that one thread holds: 16 bytes of bfloat16


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


@triton.jit
def _add_to_each(d_tiles, combs, g, k: tl.constexpr, N: tl.constexpr):
    """d_tiles_j + comb[j, k] · g."""
    more = ()
    for j in tl.static_range(N):
        more += (d_tiles[j] + combs[j * N + k][:, None] * g,)
    return more


@triton.jit
def _in_lanes(product, LANE: tl.constexpr):
    """Sums over each thread's own columns: [BLOCK_T, BLOCK_D / LANE]."""
    return tl.sum(tl.reshape(product, [product.shape[0], product.shape[1] // LANE, LANE]), 2)


@triton.jit
def _add_columns(d_columns, tiles, added, g, k: tl.constexpr, N: tl.constexpr, LANE: tl.constexpr):
    """The columns [post N | comb N·N] with the sums over a tile of g · o for post_k and g · X_j for comb[j,
    k], which threads hold apart until the end."""
    more = ()
    for column in tl.static_range(N + N * N):
        total = d_columns[column]
        if column == k:
            total += _in_lanes(g * added.to(tl.float32), LANE)
        elif column >= N and column % N == k:
            total += _in_lanes(g * tiles[column // N - 1].to(tl.float32), LANE)
        more += (total,)
    return more


@triton.jit(do_not_specialize=["num_tokens"])
def _d_streams(
    streams, output, post, comb, d_written, d_input, pre, fn, d_logits, mixes, inverse, scale,
    d_streams, d_output, partial, num_tokens,
    N: tl.constexpr, D: tl.constexpr, K: tl.constexpr, PADDED: tl.constexpr, WIDTH: tl.constexpr,
    HAS_WRITE: tl.constexpr, HAS_READ: tl.constexpr, LANE: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """partial [S, R, N + N·N]: gradients of post and comb from the columns of a split."""
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
            d_columns += (tl.zeros([BLOCK_T, BLOCK_D // LANE], tl.float32),)
    if HAS_READ:
        pres = _load_columns(pre, row, here, N)
        inv = tl.load(inverse + row, mask=here, other=0.0)
        place, whole = row[:, None] * K + c[None, :], here[:, None] & (c < K)[None, :]
        scaled = tl.load(d_logits + place, mask=whole, other=0.0) * _factors(scale, c, N, K)[None, :]
        raw = scaled * inv[:, None]  # gradient of the products fn · x
        # m = raw · inv and inv = (mean x² + eps)^-1/2: dx = -sum(dm · m) inv² / (N D) · x
        through_norm = tl.sum(scaled * tl.load(mixes + place, mask=whole, other=0.0), 1)
        through_norm *= inv * inv * (-1.0 / (N * D))
    for start in tl.range(0, WIDTH, BLOCK_D):
        d = split * WIDTH + start + tl.arange(0, BLOCK_D)
        keep = _keep(row, d, num_tokens, D, WIDTH)
        offset = row[:, None] * (N * D) + d[None, :]
        flat = row[:, None] * D + d[None, :]
        if HAS_READ:
            weight = fn + c[:, None] * (N * D) + d[None, :]
            own = (c < K)[:, None] & (d < D)[None, :]
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
                # The product waits for none of the loads above. Then the last load, done once for all k: the
                # layout of what comes last becomes that of the sum.
                product = _product(raw, tl.load(weight + k * D, mask=own, other=0.0), dtype)
                arrived = tl.load(d_input + flat, mask=keep, other=0.0).to(tl.float32)
                tile = tiles[k]
                if HAS_WRITE:
                    tile = _written(tiles, added, posts, combs, k, N)
                g = pres[k][:, None] * arrived + through_norm[:, None] * tile.to(tl.float32) + product
            if HAS_WRITE:
                g += upstreams[k].to(tl.float32)
                d_added += posts[k][:, None] * g
                d_tiles = _add_to_each(d_tiles, combs, g, k, N)
                d_columns = _add_columns(d_columns, tiles, added, g, k, N, LANE)
            else:
                tl.store(d_streams + offset + k * D, g.to(dtype), mask=keep)
        if HAS_WRITE:
            tl.store(d_output + flat, d_added.to(dtype), mask=keep)
            for j in tl.static_range(N):
                tl.store(d_streams + offset + j * D, d_tiles[j].to(dtype), mask=keep)
    if HAS_WRITE:
        # All columns in one tile: a store of each would pass through shared memory by itself.
        column = tl.arange(0, COLUMNS)
        found = tl.zeros([BLOCK_T, COLUMNS], tl.float32)
        for i in tl.static_range(N + N * N):
            found += tl.where(column[None, :] == i, tl.sum(d_columns[i], 1)[:, None], 0.0)
        place = (split * num_tokens.to(tl.int64) + row)[:, None] * (N + N * N) + column[None, :]
        tl.store(partial + place, found, mask=here[:, None] & (column < N + N * N)[None, :])


@triton.jit(do_not_specialize=["num_tokens"])
def _sum_columns(
    partial, d_post, d_comb, num_tokens,
    N: tl.constexpr, COLUMNS: tl.constexpr, NUM_SPLITS: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    COUNT: tl.constexpr = N + N * N
    row = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    here = row < num_tokens
    place = row * COUNT + column
    total = _total(partial, place, here & (column < COUNT), num_tokens.to(tl.int64) * COUNT, NUM_SPLITS)
    tl.store(d_post + row * N + column, total, mask=here & (column < N))
    tl.store(d_comb + row * (N * N) + column - N, total, mask=here & (column >= N) & (column < COUNT))


def d_streams(
    streams: Tensor, written: tuple[Tensor, ...] | None, read: Read | None
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of streams [R, N, D], output [R, D], post [R, N] and comb [R, N, N]; the last three None if
    nothing was written.

    streams: before the write. written: output, post, comb and the gradient of the new streams from elsewhere
    than the read. read: None if nothing was read.
    """
    num_tokens, n, width = streams.shape
    config = CONFIGS["d_streams"]
    num_splits, columns = triton.cdiv(width, SPLIT), triton.next_power_of_2(n + n * n)
    d_output = partial = None
    found = torch.empty_like(streams)
    if written is not None:
        d_output = torch.empty_like(written[0])
        partial = found.new_empty(num_splits, num_tokens, n + n * n, dtype=torch.float32)
    _d_streams[(triton.cdiv(num_tokens, config["BLOCK_T"]) * num_splits,)](
        streams, *(written or (None,) * 4), *(read or (None,) * 7), found, d_output, partial, num_tokens,
        **sizes(streams, None if read is None else read.fn), WIDTH=SPLIT,
        HAS_WRITE=written is not None, HAS_READ=read is not None, LANE=LANE, COLUMNS=columns, **config,
    )  # fmt: skip
    if written is None or partial is None:
        return found, None, None, None
    d_post, d_comb = torch.empty_like(written[1]), torch.empty_like(written[2])
    config = CONFIGS["sum_columns"]
    _sum_columns[(triton.cdiv(num_tokens, config["BLOCK_T"]),)](
        partial, d_post, d_comb, num_tokens, N=n, COLUMNS=columns, NUM_SPLITS=num_splits, **config
    )
    return found, d_output, d_post, d_comb
