"""x · weightᵀ on a GPU, a row of which does not depend on the rows beside it, bit for bit (report 5.2).

Libraries choose tiles and splits of the inner axis by the number of rows, and with them the order of the
sums. Here every element is one sum over the inner axis in steps of BLOCK_K, never split, however many the
rows. Where the result is small, tiles are, so that more of the chip works; the steps are the same. Operands
of 16 bits whose rows begin at 16 bytes come by tensor descriptors, which cost no registers and no address
arithmetic; how they come does not change what is summed.

M rows, N outputs, K inputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

FEW = 64  # up to so many rows
WAVE = 132  # programs that an H100 runs at once
CONFIGS: dict[str, dict[str, int]] = {
    "many": {"BLOCK_M": 128, "BLOCK_N": 256, "num_warps": 8, "num_stages": 3},
    "middle": {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 4, "num_stages": 4},
    "few": {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 5},
    "fp32": {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2},  # shared memory holds no more
}
BLOCK_K = 64
GROUP = 8  # row tiles that share the weight's columns in L2
# The interpreter multiplies bfloat16's bit patterns; fp32 holds the same numbers.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit(do_not_specialize=["num_rows"])
def _linear(
    x, weight, out, num_rows,
    N: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, HAS_DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    NUM_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    num_m = tl.cdiv(num_rows, BLOCK_M)
    program = tl.program_id(0)
    first = program // (GROUP * NUM_N) * GROUP
    size = tl.minimum(num_m - first, GROUP)
    m = first + program % (GROUP * NUM_N) % size
    n = program % (GROUP * NUM_N) // size
    row = (m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    column = (n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    here, there = (row < num_rows)[:, None], (column < N)[:, None]
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in tl.range(0, K, BLOCK_K):
        if HAS_DESCRIPTORS:
            a = x.load([m * BLOCK_M, start])
            b = weight.load([n * BLOCK_N, start])
        else:
            inside = (start + k < K)[None, :]
            a = tl.load(x + row[:, None] * K + start + k[None, :], mask=here & inside, other=0.0)
            b = tl.load(weight + column[:, None] * K + start + k[None, :], mask=there & inside, other=0.0)
        if INTERPRETED:
            sums = tl.dot(a.to(tl.float32), tl.trans(b).to(tl.float32), sums, input_precision="ieee")
        else:
            sums = tl.dot(a, tl.trans(b), sums, input_precision="ieee")
    place = row[:, None] * N + column[None, :]
    tl.store(out + place, sums.to(out.dtype.element_ty), mask=here & (column < N)[None, :])


def linear(
    x: Tensor, weight: Tensor, out_dtype: torch.dtype | None = None, *, out: Tensor | None = None
) -> Tensor:
    """x [M, K] times weight [N, K] transposed: [M, N] in `out_dtype`, by default x's; sums are fp32.

    x and weight of one type (bfloat16 or fp32). out [M, N], contiguous: the result goes there, in its type.
    ValueError if types or inner axes differ, or `out` has another shape.
    """
    (num_rows, inner), (num_columns, also) = x.shape, weight.shape
    if inner != also or x.dtype != weight.dtype:
        raise ValueError(f"x is {list(x.shape)} {x.dtype} and weight {list(weight.shape)} {weight.dtype}")
    if out is None:
        out = torch.empty(num_rows, num_columns, dtype=out_dtype or x.dtype, device=x.device)
    elif tuple(out.shape) != (num_rows, num_columns) or not out.is_contiguous():
        raise ValueError(f"out is {list(out.shape)}; it must be [{num_rows}, {num_columns}], contiguous")
    if not out.numel():
        return out
    config = CONFIGS["fp32"] if x.dtype == torch.float32 else _config(num_rows, num_columns)
    x, weight = x.contiguous(), weight.contiguous()
    has_descriptors = all(_is_described(t) for t in (x, weight))
    operands = (x, weight)
    if has_descriptors:
        heights = (config["BLOCK_M"], config["BLOCK_N"])
        operands = (TensorDescriptor.from_tensor(t, [h, BLOCK_K]) for t, h in zip(operands, heights))
    _linear[(_programs(config, num_rows, num_columns),)](
        *operands, out, num_rows, N=num_columns, K=inner, BLOCK_K=BLOCK_K, GROUP=GROUP,
        HAS_DESCRIPTORS=has_descriptors, **config,
    )  # fmt: skip
    return out


def _is_described(t: Tensor) -> bool:
    """Whether a tensor descriptor takes it: 16 bits, rows from multiples of 16 bytes on."""
    return t.dtype == torch.bfloat16 and t.shape[1] % 8 == 0 and t.data_ptr() % 16 == 0


def _config(num_rows: int, num_columns: int) -> dict[str, int]:
    """The largest tiles that fill the chip, for products of 16 bits."""
    if num_rows > FEW:
        for name in ("many", "middle"):
            if _programs(CONFIGS[name], num_rows, num_columns) >= WAVE:
                return CONFIGS[name]
    return CONFIGS["few"]


def _programs(config: dict[str, int], num_rows: int, num_columns: int) -> int:
    return triton.cdiv(num_rows, config["BLOCK_M"]) * triton.cdiv(num_columns, config["BLOCK_N"])
