"""A product of FP8 codes with block scales, for GPUs on which cuBLAS has none (`fp8_linear.product`).

The tensor cores sum 128 products of codes; times both scales that is added to an fp32 sum outside of them
(their own sums keep 14 bits). So a tile's sums are held twice, which bounds it to 128 × 128 with two warp
groups. Floor on an H100: 2·M·N·K over 1,979 TFLOP/s; the promotion costs an addition per 128 products in the
ordinary cores, a quarter of the tensor cores' time, and overlaps it only where two programs share an SM.

M, N rows of the factors, K summed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

# Tile, neighbouring tiles of rows that run together, warps, stages; `bench/quantization_gpu.py --sweep`.
PRODUCT = {"rows": 128, "columns": 128, "group": 8, "num_warps": 8, "num_stages": 4}
BLOCK = 128


@triton.jit
def _scaled_mm(
    a, b, a_scales, b_scales, out, num_rows, num_columns, depth, b_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    IS_TILED: tl.constexpr,
):  # fmt: skip
    # Tiles of GROUP neighbouring rows run together, so that their operands stay in the L2 cache.
    tall, broad = tl.cdiv(num_rows, BLOCK_M), tl.cdiv(num_columns, BLOCK_N)
    group = tl.program_id(0) // (GROUP * broad)
    size = tl.minimum(tall - group * GROUP, GROUP)
    tile = tl.program_id(0) % (GROUP * broad)
    m, n = (group * GROUP + tile % size) * BLOCK_M, (tile // size) * BLOCK_N
    row, column = m + tl.arange(0, BLOCK_M), n + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(depth // BLOCK_K):
        part = tl.dot(a.load([m, k * BLOCK_K]), tl.trans(b.load([n, k * BLOCK_K])))
        left = tl.load(a_scales + k * num_rows + row)
        if IS_TILED:  # one tile of weights: BLOCK_N is not above 128
            right = tl.load(b_scales + (n // BLOCK_K) * b_stride + k)
            acc += part * (left * right)[:, None]
        else:
            right = tl.load(b_scales + k * num_columns + column)
            acc += part * left[:, None] * right[None, :]
    at = out + row.to(tl.int64)[:, None] * num_columns + column[None, :]
    tl.store(at, acc.to(out.dtype.element_ty))


def scaled_mm(
    a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, dtype: torch.dtype, *, is_tiled: bool
) -> Tensor:
    """a [M, K], a_scales [K / 128, M] times b [N, K] transposed -> [M, N] of dtype.

    M, N and K are multiples of 128. b_scales [K / 128, N], or (is_tiled) [N / 128, at least K / 128].
    """
    num_rows, num_columns, depth = a.shape[0], b.shape[0], a.shape[1]
    out = torch.empty(num_rows, num_columns, dtype=dtype, device=a.device)
    t = PRODUCT
    left = TensorDescriptor.from_tensor(a, [t["rows"], BLOCK])
    right = TensorDescriptor.from_tensor(b, [t["columns"], BLOCK])
    _scaled_mm[triton.cdiv(num_rows, t["rows"]) * triton.cdiv(num_columns, t["columns"]),](
        left, right, a_scales, b_scales, out, num_rows, num_columns, depth, b_scales.stride(0),
        BLOCK_M=t["rows"], BLOCK_N=t["columns"], BLOCK_K=BLOCK, GROUP=t["group"], IS_TILED=is_tiled,
        num_warps=t["num_warps"], num_stages=t["num_stages"],
    )  # fmt: skip
    return out
