"""Triton kernels of the experts: rows to their places and back, clamped SwiGLU, fp32 weight gradients.

gpu_moe.py calls them, `Experts` in model/moe.py defines what they compute. No atomics: a token's experts are
added in the order of their rank, a weight's pairs in the order of their places.

R tokens, K experts a token, N = R·K pairs, E experts, D model width, I expert width, O rows of a weight.
Pair n is expert n mod K of token n div K; a place is where it stands once pairs are sorted by expert.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

# Tiles and warps; `bench/moe_gpu.py --sweep` tries others.
COPY = {"columns": 2048, "num_warps": 4}  # expand, combine
SWIGLU = {"columns": 2048, "num_warps": 4}
WEIGHT_GRADIENT = {"rows": 128, "columns": 256, "inner": 64, "group": 8, "num_warps": 8, "num_stages": 3}


@triton.jit
def _expand(source, inverse, out, width, K: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(source + token * width + column, mask=column < width)
    for k in tl.static_range(K):
        place = tl.load(inverse + token * K + k).to(tl.int64)
        tl.store(out + place * width + column, row, mask=column < width)


@triton.jit
def _combine(
    rows, second, base, inverse, out, width,
    K: tl.constexpr, BLOCK: tl.constexpr, HAS_SECOND: tl.constexpr, HAS_BASE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_here = column < width
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(K):
        place = tl.load(inverse + token * K + k).to(tl.int64) * width + column
        total += tl.load(rows + place, mask=is_here, other=0.0).to(tl.float32)
        if HAS_SECOND:
            total += tl.load(second + place, mask=is_here, other=0.0).to(tl.float32)
    if HAS_BASE:
        total += tl.load(base + token * width + column, mask=is_here, other=0.0).to(tl.float32)
    tl.store(out + token * width + column, total.to(out.dtype.element_ty), mask=is_here)


def expand(source: Tensor, inverse: Tensor) -> Tensor:
    """source [R, D] -> [N, D]: every pair's row at its place; a row is read once."""
    width, topk = source.shape[1], inverse.shape[1]
    out = source.new_empty(inverse.numel(), width)
    if inverse.numel():
        block = min(COPY["columns"], triton.next_power_of_2(width))
        _expand[(source.shape[0], triton.cdiv(width, block))](
            source, inverse, out, width, K=topk, BLOCK=block, num_warps=COPY["num_warps"]
        )
    return out


def combine(
    rows: Tensor, inverse: Tensor, *, second: Tensor | None = None, base: Tensor | None = None
) -> Tensor:
    """[R, D]: sum of each token's K rows [N, D] (and of `second`'s) in the order of rank, in fp32, plus
    base [R, D]; rounded once to the type of the rows."""
    num_tokens, topk = inverse.shape
    width = rows.shape[1]
    out = rows.new_empty(num_tokens, width)
    if num_tokens:
        block = min(COPY["columns"], triton.next_power_of_2(width))
        _combine[(num_tokens, triton.cdiv(width, block))](
            rows, second, base, inverse, out, width, K=topk, BLOCK=block,
            HAS_SECOND=second is not None, HAS_BASE=base is not None, num_warps=COPY["num_warps"],
        )  # fmt: skip
    return out


# ---- the clamped SwiGLU -------------------------------------------------------------------------


@triton.jit
def swiglu(gate, up, limit):
    clamped, held = tl.minimum(gate, limit), tl.minimum(tl.maximum(up, -limit), limit)
    sigmoid = 1.0 / (1.0 + tl.exp(-clamped))
    return clamped * sigmoid, held, sigmoid


@triton.jit
def _swiglu_forward(
    gate, up, weights, order, out, width, limit, BLOCK: tl.constexpr, HAS_WEIGHTS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place, is_here = row * width + column, column < width
    g = tl.load(gate + place, mask=is_here, other=0.0).to(tl.float32)
    u = tl.load(up + place, mask=is_here, other=0.0).to(tl.float32)
    silu, held, _ = swiglu(g, u, limit)
    active = silu * held
    if HAS_WEIGHTS:
        active *= tl.load(weights + tl.load(order + row))
    tl.store(out + place, active.to(out.dtype.element_ty), mask=is_here)


@triton.jit
def _swiglu_backward(
    grad, gate, up, weights, order, d_gate, d_up, active, d_weights, width, limit,
    BLOCK: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    weight = 1.0
    if HAS_WEIGHTS:
        pair = tl.load(order + row)
        weight = tl.load(weights + pair)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        place, is_here = row * width + column, column < width
        g = tl.load(gate + place, mask=is_here, other=0.0).to(tl.float32)
        u = tl.load(up + place, mask=is_here, other=0.0).to(tl.float32)
        upstream = tl.load(grad + place, mask=is_here, other=0.0).to(tl.float32)
        silu, held, sigmoid = swiglu(g, u, limit)
        if HAS_WEIGHTS:
            plain = silu * held
            total += upstream * plain
            tl.store(active + place, (plain * weight).to(active.dtype.element_ty), mask=is_here)
            upstream *= weight
        slope = sigmoid + silu * (1.0 - sigmoid)
        dg = tl.where(g > limit, 0.0, upstream * held * slope)
        du = tl.where(tl.abs(u) > limit, 0.0, upstream * silu)
        tl.store(d_gate + place, dg.to(d_gate.dtype.element_ty), mask=is_here)
        tl.store(d_up + place, du.to(d_up.dtype.element_ty), mask=is_here)
    if HAS_WEIGHTS:
        tl.store(d_weights + pair, tl.sum(total, axis=0))


def swiglu_forward(
    gate: Tensor, up: Tensor, limit: float, weights: Tensor | None = None, order: Tensor | None = None
) -> Tensor:
    """silu(min(gate, limit)) · clamp(up, ±limit) of [N, I] rows, times weights[order[p]] at place p: fp32
    inside, rounded once to the inputs' type."""
    rows, width = gate.shape
    out = torch.empty_like(gate)
    if rows:
        block = min(SWIGLU["columns"], triton.next_power_of_2(width))
        _swiglu_forward[(rows, triton.cdiv(width, block))](
            gate, up, weights, order, out, width, limit,
            BLOCK=block, HAS_WEIGHTS=weights is not None, num_warps=SWIGLU["num_warps"],
        )  # fmt: skip
    return out


def swiglu_backward(
    grad: Tensor,
    gate: Tensor,
    up: Tensor,
    limit: float,
    weights: Tensor | None = None,
    order: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """d_gate, d_up [N, I]; with weights [R, K] also what the forward gave [N, I], which the down projection's
    weight gradient multiplies, and d_weights [R, K] fp32."""
    rows, width = gate.shape
    d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
    active = d_weights = None
    if weights is not None:
        active, d_weights = torch.empty_like(gate), torch.empty_like(weights)
    if rows:
        block = min(SWIGLU["columns"], triton.next_power_of_2(width))
        _swiglu_backward[(rows,)](
            grad, gate, up, weights, order, d_gate, d_up, active, d_weights, width, limit,
            BLOCK=block, HAS_WEIGHTS=weights is not None, num_warps=SWIGLU["num_warps"],
        )  # fmt: skip
    return d_gate, d_up, active, d_weights


# ---- weight gradients in fp32 -------------------------------------------------------------------


@triton.jit
def _add_weight_gradient(
    d_out, rows, ends, total, height, width,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    IS_EVEN: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(1)
    stop = tl.load(ends + expert)
    start = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    if start == stop:
        return
    # Tiles of GROUP neighbouring rows run together, so that their operands stay in the L2 cache.
    tall, broad = tl.cdiv(height, BLOCK_O), tl.cdiv(width, BLOCK_I)
    group = tl.program_id(0) // (GROUP * broad)
    size = tl.minimum(tall - group * GROUP, GROUP)
    tile = tl.program_id(0) % (GROUP * broad)
    o, i = (group * GROUP + tile % size) * BLOCK_O, (tile // size) * BLOCK_I
    acc = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    whole = (stop - start) // BLOCK_K
    for n in range(whole):
        k = start + n * BLOCK_K
        acc = tl.dot(tl.trans(d_out.load([k, o])), rows.load([k, i]), acc)
    k = start + whole * BLOCK_K
    if k < stop:  # the rows behind are those of the next expert
        is_mine = (k + tl.arange(0, BLOCK_K) < stop)[:, None]
        a, b = d_out.load([k, o]), rows.load([k, i])
        a, b = tl.where(is_mine, a, 0.0).to(a.dtype), tl.where(is_mine, b, 0.0).to(b.dtype)
        acc = tl.dot(tl.trans(a), b, acc)
    # In two halves: the old sums need registers beside the new ones.
    first, second = tl.split(tl.reshape(acc, (BLOCK_O, 2, BLOCK_I // 2)).permute(0, 2, 1))
    total += (expert.to(tl.int64) * height + o) * width + i
    _add(total, first, height - o, width - i, width, BLOCK_O, BLOCK_I // 2, IS_EVEN)
    _add(
        total + BLOCK_I // 2,
        second,
        height - o,
        width - i - BLOCK_I // 2,
        width,
        BLOCK_O,
        BLOCK_I // 2,
        IS_EVEN,
    )


@triton.jit
def _add(
    total,
    part,
    num_rows,
    num_columns,
    stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    IS_EVEN: tl.constexpr,
):
    """The top left num_rows x num_columns of total [ROWS, COLUMNS] += part."""
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    place = total + row * stride + column
    if IS_EVEN:
        tl.store(place, tl.load(place) + part)
    else:
        is_here = (row < num_rows) & (column < num_columns)
        tl.store(place, tl.load(place, mask=is_here, other=0.0) + part, mask=is_here)


def add_weight_gradient(d_out: Tensor, rows: Tensor, ends: Tensor, total: Tensor) -> None:
    """total [E, O, I] fp32 += d_outᵀ · rows of each expert; d_out [N, O], rows [N, I], ends [E] int32.

    An expert without pairs is left alone. O and I are multiples of 16 bytes, as grouped_mm has them.
    """
    num_experts, height, width = total.shape
    if not rows.shape[0]:
        return
    t = WEIGHT_GRADIENT
    left = TensorDescriptor.from_tensor(d_out, [t["inner"], t["rows"]])
    right = TensorDescriptor.from_tensor(rows, [t["inner"], t["columns"]])
    tiles = triton.cdiv(height, t["rows"]) * triton.cdiv(width, t["columns"])
    _add_weight_gradient[(tiles, num_experts)](
        left, right, ends, total, height, width,
        BLOCK_O=t["rows"], BLOCK_I=t["columns"], BLOCK_K=t["inner"], GROUP=t["group"],
        IS_EVEN=height % t["rows"] == 0 and width % t["columns"] == 0,
        num_warps=t["num_warps"], num_stages=t["num_stages"],
    )  # fmt: skip
