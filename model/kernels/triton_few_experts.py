"""Triton kernels of the routed experts for few tokens, as a decoding step has: weights stream by once.

gpu_moe.py calls them; `Experts` in model/moe.py defines what they compute, and they round where the grouped
products of many tokens do. A program is a stretch of one expert's outputs: it reads those rows of the
expert's weights once for up to BLOCK_M pairs, which it gathers from the tokens themselves. Programs of
experts that no token chose end at once. No atomics; a pair's sums have one order, whatever its company.

R tokens, K experts a token, N = R·K pairs, E experts, D model width, I expert width.
Pair n is expert n mod K of token n div K; a place is where it stands once pairs are sorted by expert.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from consilience.model.kernels.triton_moe import combine, swiglu

# `bench/decode_gpu.py --sweep` tries others. In flight on an SM: programs that fit x (stages - 1) x tiles.
INNER = {"outputs": 32, "inputs": 128, "num_warps": 4, "num_stages": 4}  # of w1 and of w3
DOWN = {"outputs": 64, "inputs": 128, "num_warps": 4, "num_stages": 4}
MOST_PAIRS = 32  # of an expert that one reading of its weights serves; more come from the cache
PAIRS = 64  # pairs of a program while sorting


@triton.jit
def _sort(
    experts, ends, order, inverse, num_pairs, num_experts,
    BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """A pair's place is the number of pairs that stand before it."""
    pair = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mine = tl.load(experts + pair, mask=pair < num_pairs, other=0).to(tl.int32)
    column = tl.arange(0, BLOCK_E)
    place, until = tl.zeros((BLOCK_N,), tl.int32), tl.zeros((BLOCK_E,), tl.int32)
    for start in tl.range(0, num_pairs, BLOCK_N):
        other = start + tl.arange(0, BLOCK_N)
        expert = tl.load(experts + other, mask=other < num_pairs, other=2147483647).to(tl.int32)
        is_before = (expert[None, :] < mine[:, None]) | (
            (expert[None, :] == mine[:, None]) & (other[None, :] < pair[:, None])
        )
        place += tl.sum(is_before.to(tl.int32), 1)
        until += tl.sum((expert[None, :] <= column[:, None]).to(tl.int32), 1)
    tl.store(order + place, pair, mask=pair < num_pairs)
    tl.store(inverse + pair, place, mask=pair < num_pairs)
    if tl.program_id(0) == 0:
        tl.store(ends + column, until, mask=column < num_experts)


@triton.jit
def _inner(
    hidden, weights, order, ends, w1, w3, active, width, inner, topk, limit,
    BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr, IS_EVEN: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(1)
    stop = tl.load(ends + expert)
    begin = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    if begin == stop:
        return
    out = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    own = (expert.to(tl.int64) * inner + out)[:, None] * width
    for first in tl.range(begin, stop, BLOCK_M):
        place = first + tl.arange(0, BLOCK_M)
        is_mine = place < stop
        pair = tl.load(order + place, mask=is_mine, other=0)
        source = (pair // topk).to(tl.int64)[:, None] * width
        gate = tl.zeros((BLOCK_M, BLOCK_O), tl.float32)
        up = tl.zeros((BLOCK_M, BLOCK_O), tl.float32)
        for start in tl.range(0, width, BLOCK_K):
            k = (start + tl.arange(0, BLOCK_K))[None, :]
            is_weight = k < width if IS_EVEN else (k < width) & (out < inner)[:, None]
            x = tl.load(hidden + source + k, mask=is_mine[:, None] & (k < width), other=0.0)
            a = tl.load(w1 + own + k, mask=is_weight, other=0.0)
            b = tl.load(w3 + own + k, mask=is_weight, other=0.0)
            gate = tl.dot(x, tl.trans(a), gate)
            up = tl.dot(x, tl.trans(b), up)
        # Rounded as grouped products round theirs.
        gate = gate.to(hidden.dtype.element_ty).to(tl.float32)
        up = up.to(hidden.dtype.element_ty).to(tl.float32)
        silu, held, _ = swiglu(gate, up, limit)
        share = tl.load(weights + pair, mask=is_mine, other=0.0)[:, None]
        target = active + place.to(tl.int64)[:, None] * inner + out[None, :]
        is_here = is_mine[:, None] & (out < inner)[None, :]
        tl.store(target, (silu * held * share).to(active.dtype.element_ty), mask=is_here)


@triton.jit
def _down(
    active, ends, w2, down, width, inner,
    BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr, IS_EVEN: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(1)
    stop = tl.load(ends + expert)
    begin = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    if begin == stop:
        return
    out = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    own = (expert.to(tl.int64) * width + out)[:, None] * inner
    for first in tl.range(begin, stop, BLOCK_M):
        place = first + tl.arange(0, BLOCK_M)
        is_mine = place < stop
        source = place.to(tl.int64)[:, None] * inner
        acc = tl.zeros((BLOCK_M, BLOCK_O), tl.float32)
        for start in tl.range(0, inner, BLOCK_K):
            k = (start + tl.arange(0, BLOCK_K))[None, :]
            is_weight = k < inner if IS_EVEN else (k < inner) & (out < width)[:, None]
            x = tl.load(active + source + k, mask=is_mine[:, None] & (k < inner), other=0.0)
            a = tl.load(w2 + own + k, mask=is_weight, other=0.0)
            acc = tl.dot(x, tl.trans(a), acc)
        target = down + place.to(tl.int64)[:, None] * width + out[None, :]
        tl.store(target, acc.to(down.dtype.element_ty), mask=is_mine[:, None] & (out < width)[None, :])


def sort_few(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """`triton_route.sort_pairs` in one launch, for some hundreds of pairs."""
    num_pairs, device = experts.numel(), experts.device
    order, inverse = torch.empty(2, num_pairs, dtype=torch.int32, device=device).unbind(0)
    ends = torch.empty(num_experts, dtype=torch.int32, device=device)
    _sort[(triton.cdiv(num_pairs, PAIRS),)](
        experts, ends, order, inverse, num_pairs, num_experts,
        BLOCK_N=PAIRS, BLOCK_E=triton.next_power_of_2(num_experts),
    )  # fmt: skip
    return order, inverse.view_as(experts), ends


def few_experts(
    hidden: Tensor,
    weights: Tensor,
    experts: Tensor,
    masters: tuple[Tensor, Tensor, Tensor],
    limit: float,
    shared: Tensor,
) -> Tensor:
    """`gpu_moe.routed_experts` without a gradient: [R, D]. All contiguous, R at least 1."""
    w1, w2, w3 = masters
    num_experts, inner, width = w1.shape
    num_pairs = experts.numel()
    order, inverse, ends = sort_few(experts, num_experts)
    active, down = hidden.new_empty(num_pairs, inner), hidden.new_empty(num_pairs, width)
    # An expert has hardly more pairs than there are tokens.
    block_m = min(MOST_PAIRS, max(16, triton.next_power_of_2(hidden.shape[0])))
    _inner[(triton.cdiv(inner, INNER["outputs"]), num_experts)](
        hidden, weights, order, ends, w1, w3, active, width, inner, experts.shape[1], limit,
        BLOCK_M=block_m, BLOCK_O=INNER["outputs"], BLOCK_K=INNER["inputs"],
        IS_EVEN=inner % INNER["outputs"] == 0,
        num_warps=INNER["num_warps"], num_stages=INNER["num_stages"],
    )  # fmt: skip
    _down[(triton.cdiv(width, DOWN["outputs"]), num_experts)](
        active, ends, w2, down, width, inner,
        BLOCK_M=block_m, BLOCK_O=DOWN["outputs"], BLOCK_K=DOWN["inputs"],
        IS_EVEN=width % DOWN["outputs"] == 0,
        num_warps=DOWN["num_warps"], num_stages=DOWN["num_stages"],
    )  # fmt: skip
    return combine(down, inverse, base=shared)
