"""`kl_rows.row_pass` in Triton: one program a row, its logits read twice, its gradient written once.

The first walk keeps running maxima and sums for each lane of a block (they meet in one reduction at the end
of the row), the second goes backwards, so that what was read last is found in the second-level cache.
With parts of the vocabulary on several ranks the walks are two kernels, and the statistics of all ranks
meet between them. No atomics, no split rows: a row's result depends on nothing but the row.

Shapes: c rows, V vocabulary; statistics [c, 8] as in `kl_rows.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from consilience.model.kernels.kl_rows import NUM_STATISTICS

LAUNCH: dict[str, Any] = {"BLOCK": 8192, "num_warps": 16}
"""Lanes of a block and warps of a program."""


def row_pass(
    z_s: Tensor,
    z_t: Tensor,
    target: Tensor | None,
    weight: Tensor,
    g: Tensor,
    wants_gradient: bool,
    merge: Callable[[Tensor], Tensor] | None,
) -> Tensor:
    """As `kl_rows.row_pass`, for fp32 logits; z_s and z_t are left as they are, g may have 16 bits."""
    rows, V = z_s.shape
    statistics = z_s.new_empty(rows, NUM_STATISTICS)
    given = (z_s, z_t, z_s if target is None else target, weight, statistics, g, V)
    walks = {"HAS_TARGET": target is not None, **LAUNCH}
    if merge is None:
        _rows[rows,](*given, STATISTICS=True, GRADIENT=wants_gradient, **walks)
        return statistics
    _rows[rows,](*given, STATISTICS=True, GRADIENT=False, **walks)
    statistics = merge(statistics).contiguous()
    if wants_gradient:
        given = (*given[:4], statistics, g, V)
        _rows[rows,](*given, STATISTICS=False, GRADIENT=True, **walks)
    return statistics


@triton.jit
def _rows(
    z_s,
    z_t,
    target,
    weight,
    statistics,
    g,
    V,
    HAS_TARGET: tl.constexpr,
    STATISTICS: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    z_s += row * V
    z_t += row * V
    statistics += row * 8
    lanes = tl.arange(0, BLOCK)
    num_blocks = tl.cdiv(V, BLOCK)
    if STATISTICS:
        m_s, S_s, A, B, m_t, S_t, agree = _walk(z_s, z_t, V, num_blocks, lanes, BLOCK)
        z_y = float("-inf")
        if HAS_TARGET:
            y = tl.load(target + row)
            z_y = tl.load(z_s + y, mask=y >= 0, other=float("-inf"))
        tl.store(statistics + 0, m_s)
        tl.store(statistics + 1, S_s)
        tl.store(statistics + 2, A)
        tl.store(statistics + 3, B)
        tl.store(statistics + 4, m_t)
        tl.store(statistics + 5, S_t)
        tl.store(statistics + 6, agree)
        tl.store(statistics + 7, z_y)
    else:
        m_s = tl.load(statistics + 0)
        S_s = tl.load(statistics + 1)
        A = tl.load(statistics + 2)
        m_t = tl.load(statistics + 4)
        S_t = tl.load(statistics + 5)
    if GRADIENT:
        # c + K = A / S_s: the mean of z_s − z_t under p is all that is subtracted.
        mean = A / S_s
        share = tl.load(weight + row) / S_s
        g += row * V
        for i in range(num_blocks):
            cols = (num_blocks - 1 - i) * BLOCK + lanes
            inside = cols < V
            student = tl.load(z_s + cols, mask=inside, other=0.0, eviction_policy="evict_first")
            teacher = tl.load(z_t + cols, mask=inside, other=0.0, eviction_policy="evict_first")
            grad = tl.exp(student - m_s) * share * ((student - teacher) - mean)
            tl.store(g + cols, grad.to(g.dtype.element_ty), mask=inside, cache_modifier=".cs")


@triton.jit
def _walk(z_s, z_t, V, num_blocks, lanes, BLOCK: tl.constexpr):
    """The row's statistics (all but z_y)."""
    m_s = float("-inf")
    m_t = float("-inf")
    S_s = tl.zeros([BLOCK], tl.float32)
    S_t = tl.zeros([BLOCK], tl.float32)
    A = tl.zeros([BLOCK], tl.float32)
    B = tl.zeros([BLOCK], tl.float32)
    agree = tl.zeros([BLOCK], tl.int32)
    for i in range(num_blocks):
        cols = i * BLOCK + lanes
        inside = cols < V
        student = tl.load(z_s + cols, mask=inside, other=float("-inf"))
        teacher = tl.load(z_t + cols, mask=inside, other=float("-inf"))
        top_s = tl.maximum(m_s, tl.max(student, axis=0))
        top_t = tl.maximum(m_t, tl.max(teacher, axis=0))
        is_kept = ((top_s == m_s) & (top_t == m_t)).to(tl.int32)
        both = ((student == top_s) & (teacher == top_t)).to(tl.int32)
        agree = (agree * is_kept) | both
        shift = tl.where(m_s == float("-inf"), 0.0, m_s - top_s)
        scale = tl.where(m_s == float("-inf"), 0.0, tl.exp(shift))
        above = tl.where(inside, student - top_s, 0.0)
        e = tl.where(inside, tl.exp(above), 0.0)
        B = scale * (B + shift * S_s) + e * above
        A = scale * A + e * tl.where(inside, student - teacher, 0.0)
        S_s = scale * S_s + e
        scale_t = tl.where(m_t == float("-inf"), 0.0, tl.exp(m_t - top_t))
        S_t = scale_t * S_t + tl.exp(teacher - top_t)
        m_s = top_s
        m_t = top_t
    total = tl.sum(agree, axis=0)
    return (
        m_s,
        tl.sum(S_s, axis=0),
        tl.sum(A, axis=0),
        tl.sum(B, axis=0),
        m_t,
        tl.sum(S_t, axis=0),
        tl.where(total > 0, 1.0, 0.0),
    )
