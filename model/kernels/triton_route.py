"""Triton kernels of the router: scores and choice, and pairs sorted by expert. gpu_moe.py calls them.

`Gate` and `Experts` in model/moe.py define what they compute. No atomics: pairs are counted and placed by
blocks in order.

R tokens, K experts a token, N = R·K pairs, E experts. Pair n is expert n mod K of token n div K; a place is
where it stands once pairs are sorted by expert.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

GATE = {"rows": 4, "num_warps": 4}
PAIRS = 128  # pairs of a block while sorting
TINY = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def _affinity(logits):
    """sqrt(softplus(x)) and its slope. log(1 + z) by Kahan's correction, exact for small z too."""
    z = tl.exp(tl.minimum(logits, 20.0))
    u = 1.0 + z
    soft = tl.where(u == 1.0, z, tl.log(u) * (z / tl.where(u == 1.0, 1.0, u - 1.0)))
    soft = tl.where(logits > 20.0, logits, soft)
    scores = tl.sqrt(tl.maximum(soft, TINY))
    sigmoid = tl.where(logits > 20.0, 1.0, z / u)
    return scores, tl.where(soft < TINY, 0.0, sigmoid / (2.0 * scores))


@triton.jit
def _gate_forward(
    logits, bias, given, weights, experts, scores, num_rows, num_experts, scaling,
    K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_GIVEN: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    column, rank = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)
    is_row = row < num_rows
    is_here = is_row[:, None] & (column < num_experts)[None, :]
    place = row[:, None] * num_experts + column[None, :]
    score, _ = _affinity(tl.load(logits + place, mask=is_here, other=0.0))
    tl.store(scores + place, score, mask=is_here)
    selection = score
    if HAS_BIAS:
        selection += tl.load(bias + column, mask=column < num_experts, other=0.0)[None, :]
    selection = tl.where(is_here, selection, float("-inf"))
    chosen = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    for k in tl.static_range(K):
        best = tl.minimum(tl.argmax(selection, axis=1, tie_break_left=True), num_experts - 1)
        selection = tl.where(column[None, :] == best[:, None], float("-inf"), selection)
        if HAS_GIVEN:
            fixed = tl.load(given + row * K + k, mask=is_row, other=-1).to(tl.int32)
            best = tl.where(fixed >= 0, fixed, best)
        tl.store(experts + row * K + k, best.to(tl.int64), mask=is_row)
        mine = tl.sum(tl.where(column[None, :] == best[:, None], score, 0.0), axis=1)
        total += mine
        chosen = tl.where(rank[None, :] == k, mine[:, None], chosen)
    share = chosen / (total + 1e-20)[:, None] * scaling
    tl.store(weights + row[:, None] * K + rank[None, :], share, mask=is_row[:, None] & (rank < K)[None, :])


@triton.jit
def _gate_backward(
    logits, experts, d_weights, d_scores, d_logits, num_rows, num_experts, scaling,
    K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr, HAS_SCORES: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    column = tl.arange(0, BLOCK_E)
    is_row = row < num_rows
    is_here = is_row[:, None] & (column < num_experts)[None, :]
    place = row[:, None] * num_experts + column[None, :]
    score, slope = _affinity(tl.load(logits + place, mask=is_here, other=0.0))
    d_score = tl.zeros((BLOCK_R, BLOCK_E), tl.float32)
    if HAS_SCORES:
        d_score += tl.load(d_scores + place, mask=is_here, other=0.0)
    if HAS_WEIGHTS:
        total = tl.zeros((BLOCK_R,), tl.float32)
        inner = tl.zeros((BLOCK_R,), tl.float32)
        for k in tl.static_range(K):
            expert = tl.load(experts + row * K + k, mask=is_row, other=0).to(tl.int32)
            mine = tl.sum(tl.where(column[None, :] == expert[:, None], score, 0.0), axis=1)
            total += mine
            inner += mine * tl.load(d_weights + row * K + k, mask=is_row, other=0.0)
        total += 1e-20
        for k in tl.static_range(K):
            expert = tl.load(experts + row * K + k, mask=is_row, other=0).to(tl.int32)
            upstream = tl.load(d_weights + row * K + k, mask=is_row, other=0.0)
            d_chosen = scaling * (upstream - inner / total) / total
            d_score += tl.where(column[None, :] == expert[:, None], d_chosen[:, None], 0.0)
    tl.store(d_logits + place, d_score * slope, mask=is_here)


def gate_forward(
    logits: Tensor, bias: Tensor | None, given: Tensor | None, topk: int, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """logits [R, E] fp32, bias [E] fp32, given [R, K] int64 (-1: choose) -> weights [R, K] fp32,
    experts [R, K] int64, scores [R, E] fp32."""
    num_rows, num_experts = logits.shape
    weights = torch.empty(num_rows, topk, dtype=torch.float32, device=logits.device)
    experts = torch.empty(num_rows, topk, dtype=torch.int64, device=logits.device)
    scores = torch.empty_like(logits)
    if num_rows:
        _gate_forward[(triton.cdiv(num_rows, GATE["rows"]),)](
            logits, bias, given, weights, experts, scores, num_rows, num_experts, scaling,
            K=topk, BLOCK_R=GATE["rows"], BLOCK_E=triton.next_power_of_2(num_experts),
            BLOCK_K=triton.next_power_of_2(topk), HAS_BIAS=bias is not None, HAS_GIVEN=given is not None,
            num_warps=GATE["num_warps"],
        )  # fmt: skip
    return weights, experts, scores


def gate_backward(
    logits: Tensor, experts: Tensor, d_weights: Tensor | None, d_scores: Tensor | None, scaling: float
) -> Tensor:
    """Gradient of the logits [R, E] fp32 from those of `gate_forward`'s weights [R, K] and scores [R, E]."""
    num_rows, num_experts = logits.shape
    d_logits = torch.empty_like(logits)
    if num_rows:
        _gate_backward[(triton.cdiv(num_rows, GATE["rows"]),)](
            logits, experts, d_weights, d_scores, d_logits, num_rows, num_experts, scaling,
            K=experts.shape[1], BLOCK_R=GATE["rows"], BLOCK_E=triton.next_power_of_2(num_experts),
            HAS_WEIGHTS=d_weights is not None, HAS_SCORES=d_scores is not None, num_warps=GATE["num_warps"],
        )  # fmt: skip
    return d_logits


# ---- sorting pairs by expert --------------------------------------------------------------------


@triton.jit
def _count(experts, counts, num_pairs, num_experts, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr):
    pair, column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_E)
    expert = tl.load(experts + pair, mask=pair < num_pairs, other=-1).to(tl.int32)
    mine = tl.sum((expert[:, None] == column[None, :]).to(tl.int32), axis=0)
    place = tl.program_id(0).to(tl.int64) * num_experts + column
    tl.store(counts + place, mine, mask=column < num_experts)


@triton.jit
def _scan(counts, totals, num_blocks, num_experts, BLOCK_B: tl.constexpr, BLOCK_E: tl.constexpr):
    """counts [blocks, E] become those of the earlier blocks, totals [E] those of all."""
    column = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    before = tl.zeros((BLOCK_E,), tl.int32)
    for start in range(0, num_blocks, BLOCK_B):
        block = start + tl.arange(0, BLOCK_B)
        place = block.to(tl.int64)[:, None] * num_experts + column[None, :]
        is_here = (block < num_blocks)[:, None] & (column < num_experts)[None, :]
        count = tl.load(counts + place, mask=is_here, other=0)
        tl.store(counts + place, tl.cumsum(count, axis=0) - count + before[None, :], mask=is_here)
        before += tl.sum(count, axis=0)
    tl.store(totals + column, before, mask=column < num_experts)


@triton.jit
def _place(experts, counts, totals, ends, order, inverse, num_pairs, num_experts, BLOCK_N: tl.constexpr):
    first = tl.program_id(0) * BLOCK_N
    pair, other = first + tl.arange(0, BLOCK_N), first + tl.arange(0, BLOCK_N)
    is_here = pair < num_pairs
    expert = tl.load(experts + pair, mask=is_here, other=0).to(tl.int32)
    others = tl.load(experts + other, mask=other < num_pairs, other=-1).to(tl.int32)
    is_earlier = (expert[:, None] == others[None, :]) & (other[None, :] < pair[:, None])
    place = tl.sum(is_earlier.to(tl.int32), axis=1)
    place += tl.load(ends + expert, mask=is_here, other=0) - tl.load(totals + expert, mask=is_here, other=0)
    place += tl.load(counts + tl.program_id(0).to(tl.int64) * num_experts + expert, mask=is_here, other=0)
    tl.store(order + place, pair, mask=is_here)
    tl.store(inverse + pair, place, mask=is_here)


def sort_pairs(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """experts [R, K] int64 -> order [N] (pair at each place), inverse [R, K] (place of each pair) and
    ends [E] (last place of each expert, plus one), all int32. Stable: pairs of an expert keep their order."""
    num_pairs, device = experts.numel(), experts.device
    order, inverse = torch.empty(2, num_pairs, dtype=torch.int32, device=device).unbind(0)
    num_blocks = triton.cdiv(num_pairs, PAIRS)
    counts = torch.empty(num_blocks, num_experts, dtype=torch.int32, device=device)
    totals = torch.zeros(num_experts, dtype=torch.int32, device=device)
    if not num_pairs:
        return order, inverse.view_as(experts), totals
    wide = triton.next_power_of_2(num_experts)
    _count[(num_blocks,)](experts, counts, num_pairs, num_experts, BLOCK_N=PAIRS, BLOCK_E=wide)
    _scan[(triton.cdiv(num_experts, 32),)](counts, totals, num_blocks, num_experts, BLOCK_B=64, BLOCK_E=32)
    ends = totals.cumsum(0, dtype=torch.int32)
    _place[(num_blocks,)](
        experts, counts, totals, ends, order, inverse, num_pairs, num_experts, BLOCK_N=PAIRS
    )
    return order, inverse.view_as(experts), ends
