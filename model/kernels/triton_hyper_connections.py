"""mHC on a GPU, forward: the write of one sub-layer and the read of the next (specification 3).

Three kernels. `_write_project` writes new streams and multiplies them by `fn` while they are on chip, split
over the width into partial sums; `_coefficients` adds these in a fixed order and runs Sinkhorn in
registers, a few lanes a token; `_apply` reads the new streams again and writes the layer input. 112 KB a
token at D 4096 and N 4 in bf16: 157 us for 4,096 tokens at 3 TB/s, so about 185 us are expected of 85 % of
it.

One kernel that holds a token's row from the write to the read would move 80 KB. But a chip's 132 cores hold
8 tokens' rows each, and then read the 1.6 MB of `fn` once every 8 tokens: 800 MB from L2, longer than what
it saves.

No atomics, and neither tiles nor splits depend on the number of tokens: a token's result does not depend on
what it is computed with, and a new length compiles nothing.

R tokens, N streams, D model width, K rows of `fn` (N (2 + N) of a connection, N of a collapse), S splits of
D.
"""

from __future__ import annotations

from math import isqrt
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

SPLIT = 256  # width of a partial sum
CONFIGS: dict[str, dict[str, int]] = {
    "write_project": {"BLOCK_T": 64, "BLOCK_D": 32, "num_warps": 4, "num_stages": 3},
    "coefficients": {"BLOCK_T": 16, "num_warps": 2},
    "apply": {"BLOCK_T": 4, "BLOCK_D": 512, "num_warps": 4},
}
# The interpreter multiplies bfloat16's bit patterns; fp32 holds the same numbers.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _dot(a, b, sums):
    if INTERPRETED:
        sums = tl.dot(a.to(tl.float32), b.to(tl.float32), sums, input_precision="ieee")
    else:
        sums = tl.dot(a, b, sums)
    return sums


@triton.jit
def _settle(tile):
    """tile itself, computed once: without this Triton computes it in the layout of a store and again in that
    of a product, with twice the registers."""
    if not INTERPRETED:
        if tile.dtype == tl.bfloat16:
            tile = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [tile], tl.bfloat16, False, 2)
        else:
            tile = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [tile], tl.float32, False, 1)
    return tile


@triton.jit
def _load_streams(pointer, offset, keep, N: tl.constexpr, D: tl.constexpr):
    """The N streams' tiles of the tokens and columns in `offset`."""
    tiles = ()
    for j in tl.static_range(N):
        tiles += (tl.load(pointer + offset + j * D, mask=keep, other=0.0),)
    return tiles


@triton.jit
def _load_columns(pointer, row, keep, COUNT: tl.constexpr):
    """The COUNT numbers of each token, one vector each."""
    columns = ()
    for c in tl.static_range(COUNT):
        columns += (tl.load(pointer + row * COUNT + c, mask=keep, other=0.0),)
    return columns


@triton.jit
def _written(tiles, output, post, comb, k: tl.constexpr, N: tl.constexpr):
    """post_k · o + sum_j comb[j, k] X_j in the streams' type."""
    total = post[k][:, None] * output.to(tl.float32)
    for j in tl.static_range(N):
        total += comb[j * N + k][:, None] * tiles[j].to(tl.float32)
    return _settle(total.to(tiles[0].dtype))


@triton.jit
def _keep(row, column, num_tokens, D: tl.constexpr, BLOCK_D: tl.constexpr):
    inside = (row < num_tokens)[:, None]
    if D % BLOCK_D != 0:
        inside = inside & (column < D)[None, :]
    return inside


@triton.jit(do_not_specialize=["num_tokens"])
def _write_project(
    streams, output, post, comb, fn, written, partial, squares, num_tokens,
    N: tl.constexpr, D: tl.constexpr, K: tl.constexpr, PADDED: tl.constexpr, WIDTH: tl.constexpr,
    HAS_WRITE: tl.constexpr, HAS_READ: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    NUM_SPLITS: tl.constexpr = (D + WIDTH - 1) // WIDTH
    split = tl.program_id(0) % NUM_SPLITS
    row = (tl.program_id(0) // NUM_SPLITS * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    here = row < num_tokens
    c = tl.arange(0, PADDED)
    if HAS_WRITE:
        posts = _load_columns(post, row, here, N)
        combs = _load_columns(comb, row, here, N * N)
    sums = tl.zeros([BLOCK_T, PADDED], tl.float32)
    square = tl.zeros([BLOCK_T], tl.float32)
    for start in tl.range(0, WIDTH, BLOCK_D):
        d = split * WIDTH + start + tl.arange(0, BLOCK_D)
        keep = _keep(row, d, num_tokens, D, WIDTH)
        offset = row[:, None] * (N * D) + d[None, :]
        tiles = _load_streams(streams, offset, keep, N, D)
        if HAS_WRITE:
            added = tl.load(output + row[:, None] * D + d[None, :], mask=keep, other=0.0)
        chunk_square = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
        for k in tl.static_range(N):
            tile = tiles[k]
            if HAS_WRITE:
                tile = _written(tiles, added, posts, combs, k, N)
                tl.store(written + offset + k * D, tile, mask=keep)
            if HAS_READ:
                wide = tile.to(tl.float32)
                chunk_square += wide * wide
                weight = tl.load(
                    fn + c[:, None] * (N * D) + k * D + d[None, :],
                    mask=(c < K)[:, None] & (d < D)[None, :],
                    other=0.0,
                )
                sums = _add_product(sums, tile, tl.trans(weight))
        if HAS_READ:
            square += tl.sum(chunk_square, 1)
    if HAS_READ:
        place = split * num_tokens.to(tl.int64) + row
        tl.store(squares + place, square, mask=here)
        tl.store(partial + place[:, None] * K + c[None, :], sums, mask=here[:, None] & (c < K)[None, :])


@triton.jit
def _add_product(sums, x, weight):
    """sums + x · weight. bfloat16 streams are exact in a product of bfloat16; the weight goes in two pieces,
    to 2^-17 (DeepSeek's own kernel multiplies in tf32, to 2^-11)."""
    if x.dtype == tl.bfloat16:
        for _ in tl.static_range(2):
            piece = weight.to(tl.bfloat16)
            sums = _dot(x, piece, sums)
            weight -= piece.to(tl.float32)
    else:
        sums = tl.dot(x, weight, sums, input_precision="ieee")
    return sums


@triton.jit
def _total(partial, place, keep, stride, NUM_SPLITS: tl.constexpr):
    """The splits' sum in their order."""
    total = tl.load(partial + place, mask=keep, other=0.0)
    for s in tl.static_range(1, NUM_SPLITS):
        total += tl.load(partial + s * stride + place, mask=keep, other=0.0)
    return total


@triton.jit
def _soft(logits):
    """Softmax over destinations: [BLOCK_T, N, N]."""
    grown = tl.exp(logits - tl.max(logits, 2, keep_dims=True))
    return grown / tl.sum(grown, 2, keep_dims=True)


@triton.jit(do_not_specialize=["num_tokens"])
def _coefficients(
    partial, squares, base, scale, mixes, inverse, pre, post, comb, num_tokens, eps, norm_eps,
    N: tl.constexpr, D: tl.constexpr, K: tl.constexpr, NUM_SPLITS: tl.constexpr, ROUNDS: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    here = row < num_tokens
    n = tl.arange(0, N)
    num = num_tokens.to(tl.int64)
    square = _total(squares, row, here, num, NUM_SPLITS)
    inv = 1.0 / tl.sqrt_rn(square / (N * D) + norm_eps)
    tl.store(inverse + row, inv, mask=here)

    place, keep = row[:, None] * K + n[None, :], here[:, None]
    out = row[:, None] * N + n[None, :]
    mix = _total(partial, place, keep, num * K, NUM_SPLITS) * inv[:, None]
    tl.store(mixes + place, mix, mask=keep)
    tl.store(pre + out, tl.sigmoid(tl.load(scale) * mix + tl.load(base + n)[None, :]) + eps, mask=keep)
    if ROUNDS > 0:
        place += N
        mix = _total(partial, place, keep, num * K, NUM_SPLITS) * inv[:, None]
        tl.store(mixes + place, mix, mask=keep)
        soft = tl.sigmoid(tl.load(scale + 1) * mix + tl.load(base + N + n)[None, :])
        tl.store(post + out, 2.0 * soft, mask=keep)

        pair = n[None, :, None] * N + n[None, None, :]
        place3, keep3 = row[:, None, None] * K + 2 * N + pair, here[:, None, None]
        mix3 = _total(partial, place3, keep3, num * K, NUM_SPLITS) * inv[:, None, None]
        tl.store(mixes + place3, mix3, mask=keep3)
        x = _soft(tl.load(scale + 2) * mix3 + tl.load(base + 2 * N + pair)) + eps
        x = x / (tl.sum(x, 1, keep_dims=True) + eps)
        for _ in tl.range(ROUNDS - 1):
            x = x / (tl.sum(x, 2, keep_dims=True) + eps)
            x = x / (tl.sum(x, 1, keep_dims=True) + eps)
        tl.store(comb + row[:, None, None] * (N * N) + pair, x, mask=keep3)


@triton.jit(do_not_specialize=["num_tokens"])
def _apply(
    streams, pre, layer_input, num_tokens,
    N: tl.constexpr, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    NUM_BLOCKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    # Last tokens first: their streams were written last, so that L2 still holds some.
    place = tl.num_programs(0) - 1 - tl.program_id(0)
    row = (place // NUM_BLOCKS * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    d = place % NUM_BLOCKS * BLOCK_D + tl.arange(0, BLOCK_D)
    keep = _keep(row, d, num_tokens, D, BLOCK_D)
    tiles = _load_streams(streams, row[:, None] * (N * D) + d[None, :], keep, N, D)
    weights = _load_columns(pre, row, row < num_tokens, N)
    total = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for j in tl.static_range(N):
        total += weights[j][:, None] * tiles[j].to(tl.float32)
    tl.store(layer_input + row[:, None] * D + d[None, :], total.to(tiles[0].dtype), mask=keep)


def sizes(streams: Tensor, fn: Tensor | None) -> dict[str, Any]:
    """The compile-time sizes that all kernels of an operation share."""
    num_streams, width = streams.shape[1:]
    num_rows = 0 if fn is None else fn.shape[0]
    padded = max(16, triton.next_power_of_2(num_rows))
    return {"N": num_streams, "D": width, "K": num_rows, "PADDED": padded}


def write_project(
    streams: Tensor,
    output: Tensor | None,
    post: Tensor | None,
    comb: Tensor | None,
    fn: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """New streams [R, N, D] (the old ones if `output` is None), partial [S, R, K], squares [S, R] (None
    without `fn`). streams [R, N, D] and output [R, D] of one type, the rest fp32; all contiguous."""
    num_tokens, _, width = streams.shape
    config = CONFIGS["write_project"]
    num_splits = triton.cdiv(width, SPLIT)
    written = streams if output is None else torch.empty_like(streams)
    partial = squares = None
    if fn is not None:
        partial = fn.new_empty(num_splits, num_tokens, fn.shape[0])
        squares = fn.new_empty(num_splits, num_tokens)
    _write_project[(triton.cdiv(num_tokens, config["BLOCK_T"]) * num_splits,)](
        streams, output, post, comb, fn, written, partial, squares, num_tokens,
        **sizes(streams, fn), WIDTH=SPLIT, HAS_WRITE=output is not None, HAS_READ=fn is not None, **config,
    )  # fmt: skip
    return written, partial, squares


def coefficients(
    partial: Tensor,
    squares: Tensor,
    width: int,
    base: Tensor,
    scale: Tensor,
    rounds: int,
    eps: float,
    norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """pre [R, N], post [R, N], comb [R, N, N] (both empty if rounds is 0), mixes [R, K], inverse norms [R].

    partial [S, R, K] and squares [S, R] as `write_project` returns them for streams of `width` D.
    """
    num_splits, num_tokens, num_rows = partial.shape
    new = partial.new_empty
    is_whole = rounds > 0
    n = isqrt(num_rows + 1) - 1 if is_whole else num_rows  # K = N (2 + N)
    mixes, inverse, pre = new(num_tokens, num_rows), new(num_tokens), new(num_tokens, n)
    post, comb = (new(num_tokens, n), new(num_tokens, n, n)) if is_whole else (new(0), new(0))
    config = CONFIGS["coefficients"]
    _coefficients[(triton.cdiv(num_tokens, config["BLOCK_T"]),)](
        partial, squares, base, scale, mixes, inverse, pre, post, comb, num_tokens, eps, norm_eps,
        N=n, D=width, K=num_rows, NUM_SPLITS=num_splits, ROUNDS=rounds, **config,
    )  # fmt: skip
    return pre, post, comb, mixes, inverse


def apply(streams: Tensor, pre: Tensor) -> Tensor:
    """sum_j pre_j X_j: [R, D] in the streams' type."""
    num_tokens, n, width = streams.shape
    layer_input = streams.new_empty(num_tokens, width)
    config = CONFIGS["apply"]
    num_programs = triton.cdiv(num_tokens, config["BLOCK_T"]) * triton.cdiv(width, config["BLOCK_D"])
    _apply[(num_programs,)](streams, pre, layer_input, num_tokens, N=n, D=width, **config)
    return layer_input
