"""Symmetric products X Xᵀ in Triton, a batch at a time: only tiles that touch the upper triangle are computed
and stored twice, at their place and mirrored (kernel notes 5; the twin is torch.bmm(x, x.mT)).

The epilogue adds what a Newton–Schulz step wants: out = scale · X Xᵀ + addend_scale · C + diagonal · I. A
symmetric X makes it a polynomial in X: X Xᵀ is X² then. Every entry of the upper triangle is one sum in fp32
over the inner axis, written once and copied below, so the result is symmetric to the last bit.

Floor: half the FLOP of a product, n² m of n × m matrices. Tiles of 128 × 256 compute 0.56 of the square at
n = 2,048 and 0.53 at 4,096; a program holds 128 registers of sums a thread and up to four stages of 48 KB.

Shapes: K matrices, n rows, m inner.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

CONFIGS: dict[str, dict[str, int]] = {
    "large": {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "num_warps": 8, "num_stages": 4},
    "small": {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},  # two an SM
}
TILE_TIME = {"large": 1.9, "small": 1.0}  # of a program; 2 by FLOP, of which large tiles read less
NUM_SMS = 132  # of an H100
GROUP = 8  # row tiles whose columns are walked together: they share them in L2


@triton.jit
def _product(
    rows, columns, addend, out, order, n, inner, scale, addend_scale, diagonal,
    HAS_ADDEND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    matrix = tl.program_id(1)
    i = tl.load(order + 2 * tl.program_id(0)) * BLOCK_M
    j = tl.load(order + 2 * tl.program_id(0) + 1) * BLOCK_N
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    # Rows beyond a matrix are the next one's: they reach no entry that is stored.
    for start in tl.range(0, inner, BLOCK_K):
        a = rows.load([matrix * n + i, start])
        b = columns.load([matrix * n + j, start])
        sums = tl.dot(a, tl.trans(b), sums)
    row, column = i + tl.arange(0, BLOCK_M), j + tl.arange(0, BLOCK_N)
    inside = (row < n)[:, None] & (column < n)[None, :]
    base = matrix.to(tl.int64) * n * n
    place = row[:, None] * n + column[None, :]
    value = scale * sums
    if HAS_ADDEND:
        value += addend_scale * tl.load(addend + base + place, mask=inside, other=0.0).to(tl.float32)
    value += tl.where(row[:, None] == column[None, :], diagonal, 0.0)
    value = value.to(out.dtype.element_ty)
    mirrored = column[:, None] * n + row[None, :]
    if i + BLOCK_M <= j:
        tl.store(out + base + place, value, mask=inside)
        tl.store(out + base + mirrored, tl.trans(value), mask=(column < n)[:, None] & (row < n)[None, :])
    else:
        # The tile meets the diagonal: its lower part belongs to its own mirror or to another tile's.
        tl.store(out + base + place, value, mask=inside & (row[:, None] <= column[None, :]))
        above = (column < n)[:, None] & (row < n)[None, :] & (row[None, :] < column[:, None])
        tl.store(out + base + mirrored, tl.trans(value), mask=above)


def product(
    x: Tensor,
    out: Tensor,
    addend: Tensor | None = None,
    *,
    scale: float = 1.0,
    addend_scale: float = 1.0,
    diagonal: float = 0.0,
) -> Tensor:
    """out [K, n, n] = scale · x xᵀ + addend_scale · addend + diagonal · I; returns it.

    x [K, n, m] and the symmetric addend [K, n, n] contiguous, of out's type of 16 bits; n and m multiples of
    16. `out` may be neither of them. ValueError on other shapes.
    """
    k, n, m = x.shape
    if tuple(out.shape) != (k, n, n) or n % 16 or m % 16 or not x.is_contiguous() or not out.is_contiguous():
        raise ValueError(
            f"x {list(x.shape)} and out {list(out.shape)}: they must be contiguous, [K, n, m] and [K, n, n] "
            "with n and m multiples of 16"
        )
    config, order = _launch(k, n, x.device)
    flat, block_k = x.view(k * n, m), config["BLOCK_K"]
    _product[(len(order), k)](
        TensorDescriptor.from_tensor(flat, [config["BLOCK_M"], block_k]),
        TensorDescriptor.from_tensor(flat, [config["BLOCK_N"], block_k]),
        out if addend is None else addend, out, order, n, m, scale, addend_scale, diagonal,
        HAS_ADDEND=addend is not None, **config,
    )  # fmt: skip
    return out


def _launch(k: int, n: int, device: torch.device) -> tuple[dict[str, int], Tensor]:
    """The setting whose last round of programs leaves the chip idle for least, and the order of its tiles."""
    found = {
        name: (config, _order(n, config["BLOCK_M"], config["BLOCK_N"], device))
        for name, config in CONFIGS.items()
    }
    rounds = {name: triton.cdiv(k * len(order), NUM_SMS) for name, (_, order) in found.items()}
    return found[min(rounds, key=lambda name: rounds[name] * TILE_TIME[name])]


@functools.cache
def _order(n: int, block_m: int, block_n: int, device: torch.device) -> Tensor:
    """(row tile, column tile) [tiles, 2] int32 of the tiles that touch the upper triangle of n × n."""
    num_m, num_n = triton.cdiv(n, block_m), triton.cdiv(n, block_n)
    tiles = [
        (i, j)
        for band in range(0, num_m, GROUP)
        for j in range(num_n)
        for i in range(band, min(band + GROUP, num_m))
        if (j + 1) * block_n > i * block_m
    ]
    return torch.tensor(tiles, dtype=torch.int32, device=device)
