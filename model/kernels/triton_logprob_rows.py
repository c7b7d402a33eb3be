"""The rows of `gpu_linear_logprob.py` in Triton: one program a row, read twice, written once.

A row's statistics: 0 m the largest logit, 1 log S with S = Σ e^(z − m), 2 the entropy, log S − B / S with
B = Σ e^(z − m) (z − m), 3 the target's log-probability z_y − m − log S, all of logits z divided by the
temperature. No atomics, blocks of one size: a row's result depends on nothing but the row, so the exact
mode's sampler (`log_softmax`) and trainer (`row_pass` at temperature 1) read the same bits here.

Shapes: c rows, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

NUM_STATISTICS = 4
LAUNCH: dict[str, Any] = {"BLOCK": 16384, "num_warps": 32}
"""Lanes of a block and warps of a program."""
# What `_rows` writes besides statistics; LOG writes log-probabilities and no statistics.
NOTHING, LESS_TARGET, LOG = (tl.constexpr(i) for i in range(3))


def row_pass(logits: Tensor, target: Tensor, temperature: float, u: Tensor | None) -> Tensor:
    """Statistics [c, 4] of fp32 logits [c, V]; u [c, V], if given, becomes p − 1[v = y]."""
    rows, V = logits.shape
    statistics = logits.new_empty(rows, NUM_STATISTICS)
    out, kind = (logits, NOTHING) if u is None else (u, LESS_TARGET)
    _rows[rows,](logits, target, statistics, out, V, 1 / temperature, OUT=kind.value, **LAUNCH)
    return statistics


def log_softmax(logits: Tensor) -> Tensor:
    """Log-probabilities [c, V] of fp32 logits [c, V], contiguous; of a target those that `row_pass` finds."""
    rows, V = logits.shape
    out = torch.empty_like(logits)
    if rows:
        _rows[rows,](logits, logits, logits, out, V, 1.0, OUT=LOG.value, **LAUNCH)
    return out


def gradient(
    logits: Tensor,
    target: Tensor,
    statistics: Tensor,
    temperature: float,
    a: Tensor,
    b: Tensor | None,
    g: Tensor,
) -> None:
    """g [c, V] = −a u − b p (log p + entropy) from fp32 logits [c, V] and their statistics; a, b [c]."""
    rows, V = logits.shape
    given = (logits, target, statistics, a, a if b is None else b, g, V, 1 / temperature)
    _gradient[rows,](*given, IS_KEPT=False, HAS_ENTROPY=b is not None, **LAUNCH)


def gradient_of_kept(u: Tensor, target: Tensor, statistics: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The same [c, V] from the kept u [c, V], in its type."""
    rows, V = u.shape
    g = torch.empty_like(u)
    _gradient[rows,](u, target, statistics, a, b, g, V, 1.0, IS_KEPT=True, HAS_ENTROPY=True, **LAUNCH)
    return g


def summary(statistics: Tensor) -> tuple[Tensor, Tensor]:
    """logprob [n] and entropy [n] of statistics [n, 4]."""
    return statistics[:, 3].clone(), statistics[:, 2].clone()


@triton.jit
def _rows(logits, target, statistics, out, V, inverse_temperature, OUT: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * V
    lanes = tl.arange(0, BLOCK)
    num_blocks = tl.cdiv(V, BLOCK)
    m = float("-inf")
    S = tl.zeros([BLOCK], tl.float32)
    B = tl.zeros([BLOCK], tl.float32)
    for i in range(num_blocks):
        cols = i * BLOCK + lanes
        inside = cols < V
        z = tl.load(logits + cols, mask=inside, other=float("-inf")) * inverse_temperature
        top = tl.maximum(m, tl.max(z, axis=0))
        shift = tl.where(m == float("-inf"), 0.0, m - top)
        scale = tl.where(m == float("-inf"), 0.0, tl.exp(shift))
        above = tl.where(inside, z - top, 0.0)
        e = tl.where(inside, tl.exp(above), 0.0)
        B = scale * (B + shift * S) + e * above
        S = scale * S + e
        m = top
    total = tl.sum(S, axis=0)
    log_sum = tl.log(total)
    y = 0
    if OUT != LOG:
        y = tl.load(target + row)
        statistics += row * 4
        tl.store(statistics + 0, m)
        tl.store(statistics + 1, log_sum)
        tl.store(statistics + 2, log_sum - tl.sum(B, axis=0) / total)
        tl.store(statistics + 3, tl.load(logits + y) * inverse_temperature - m - log_sum)
    if OUT != NOTHING:
        out += row * V
        share = 1.0 / total
        for i in range(num_blocks):
            cols = (num_blocks - 1 - i) * BLOCK + lanes
            inside = cols < V
            z = tl.load(logits + cols, mask=inside, other=0.0, eviction_policy="evict_first")
            if OUT == LOG:
                value = z * inverse_temperature - m - log_sum
            else:
                p = tl.exp(z * inverse_temperature - m) * share
                value = tl.where(cols == y, p - 1.0, p)
            tl.store(out + cols, value, mask=inside, cache_modifier=".cs")


@triton.jit
def _gradient(
    source,
    target,
    statistics,
    a,
    b,
    g,
    V,
    inverse_temperature,
    IS_KEPT: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    source += row * V
    g += row * V
    statistics += row * 4
    lanes = tl.arange(0, BLOCK)
    m = tl.load(statistics + 0)
    log_sum = tl.load(statistics + 1)
    entropy = tl.load(statistics + 2)
    logp_y = tl.load(statistics + 3)
    y = tl.load(target + row)
    a_row = tl.load(a + row)
    b_row = tl.load(b + row)
    for i in range(tl.cdiv(V, BLOCK)):
        cols = i * BLOCK + lanes
        inside = cols < V
        is_target = cols == y
        x = tl.load(source + cols, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
        if IS_KEPT:
            # 16 bits hold p − 1 of the target, not p: its own log-probability is known better.
            p = tl.where(is_target, tl.exp(logp_y), x)
            log_p = tl.where(is_target, logp_y, tl.log(tl.maximum(p, 1e-38)))
            u = x
        else:
            log_p = x * inverse_temperature - m - log_sum
            p = tl.exp(log_p)
            u = tl.where(is_target, p - 1.0, p)
        grad = -a_row * u
        if HAS_ENTROPY:
            grad -= b_row * p * (log_p + entropy)
        tl.store(g + cols, grad.to(g.dtype.element_ty), mask=inside, cache_modifier=".cs")
