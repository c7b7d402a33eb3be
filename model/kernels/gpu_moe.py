"""The mixture of experts on a GPU, in bf16: Triton around torch's grouped GEMM, with a backward of its own.

The twins are `Gate`, `Experts` and `SharedExperts` in model/moe.py, on whose parameters this works as they
are stored: grouped_mm reads [E, O, I] and its transposed view alike, so nothing is packed or copied. It takes
bf16 only, adds in fp32, rounds to bf16, needs rows of whole 16 bytes, and does not ask the host for the
counts (compute capability 9 and 10; below, it falls back to a loop that does).

Kept for the backward: hidden states, gate and up projections [N, I], weights and places. The rows of the
experts and the SwiGLU's output are made again. No atomics anywhere: the same bits in every run.

R tokens, K experts a token, N = R·K pairs, E experts, D model width, I expert width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from consilience.model.kernels import fp8_expert, fp8_linear
from consilience.model.kernels.choice import uses_triton
from consilience.model.linear import project
from consilience.model.recompute import named

MOST_EXPERTS, MOST_CHOSEN = 1024, 32  # a row of scores must fit the registers of a few warps
FEW_TOKENS = 64  # up to so many, without a gradient, triton_few_experts.py serves


def is_available(hidden: Tensor, w1: Tensor, topk: int) -> bool:
    """Whether hidden [R, D] and experts w1 [E, I, D], topk of them a token, can go through here."""
    is_bf16 = hidden.dtype == w1.dtype == torch.bfloat16
    is_aligned = all(size % 8 == 0 for size in w1.shape[1:])
    fits = w1.shape[0] <= MOST_EXPERTS and topk <= MOST_CHOSEN
    return is_bf16 and is_aligned and fits and hidden.shape[0] > 0 and uses_triton(hidden, w1)


# ---- the router ---------------------------------------------------------------------------------


def route(
    gate: Any, hidden: Tensor, token_ids: Tensor, fixed: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """What a `Gate` gives for hidden [R, D] and token_ids [R]: weights [R, K] fp32, experts [R, K] int64 and
    scores [R, E] fp32. `fixed` as there.

    Logits are fp32 sums of exact products where hidden states and weight are bf16.
    """
    given = gate.tid2eid[token_ids] if gate.is_hash else fixed
    bias = None if gate.is_hash else gate.bias
    return _Route.apply(hidden, gate.weight, bias, given, gate.topk, gate.scaling)  # type: ignore[return-value]


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        given: Tensor | None,
        topk: int,
        scaling: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        from consilience.model.kernels.triton_route import gate_forward

        logits = named("router", wide_mm, hidden, weight.t())
        given = None if given is None else given.contiguous()
        weights, experts, scores = gate_forward(logits, bias, given, topk, scaling)
        ctx.save_for_backward(hidden, weight, logits, experts)
        ctx.scaling = scaling
        ctx.mark_non_differentiable(experts)
        ctx.set_materialize_grads(False)
        return weights, experts, scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        from consilience.model.kernels.triton_route import gate_backward

        hidden, weight, logits, experts = ctx.saved_tensors
        d_weights, _, d_scores = (None if g is None else g.contiguous() for g in grads)
        d_hidden = d_weight = None
        if d_weights is None and d_scores is None:
            return None, None, None, None, None, None
        d_logits = gate_backward(logits, experts, d_weights, d_scores, ctx.scaling)
        if ctx.needs_input_grad[0]:
            d_hidden = wide_mm(d_logits, weight).to(hidden.dtype)
        if ctx.needs_input_grad[1]:
            d_weight = wide_mm(d_logits.t(), hidden).to(weight.dtype)
        return d_hidden, d_weight, None, None, None, None


def wide_mm(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in fp32. bf16 by bf16 is exact in each product; fp32 by bf16 is two bf16 products, whose sum has
    16 bits of a: 256 times what a result in bf16 keeps. Else, and on a CPU, in fp32."""
    if not a.is_cuda or b.dtype != torch.bfloat16:
        return torch.mm(a.float(), b.float())
    if a.dtype == torch.bfloat16:
        return torch.mm(a, b, out_dtype=torch.float32)
    high = a.bfloat16()
    low = (a - high).bfloat16()
    return torch.mm(high, b, out_dtype=torch.float32) + torch.mm(low, b, out_dtype=torch.float32)


# ---- routed experts -----------------------------------------------------------------------------


def routed_experts(
    hidden: Tensor,
    weights: Tensor,
    experts: Tensor,
    masters: tuple[Tensor, Tensor, Tensor],
    limit: float,
    shared: Tensor,
) -> Tensor:
    """Σ_k weight_k · expert_k(hidden) in the order of rank, plus what the shared expert gave: [R, D] bf16.

    hidden, shared [R, D] bf16; weights [R, K] fp32, experts [R, K] int64 in [0, E) (not checked: that would
    wait for the GPU); masters = w1, w2, w3 as `Experts` stores them. Sums are fp32 and rounded once.

    A master with an attribute `main_grad` [E, …] fp32 gets its gradient added there and none from autograd;
    without one autograd gets it in bf16 (fp32 within a call).
    """
    if hidden.shape[0] <= FEW_TOKENS and not torch.is_grad_enabled():
        from consilience.model.kernels.triton_few_experts import few_experts

        given = (hidden.contiguous(), weights.contiguous(), experts.contiguous())
        return few_experts(*given, masters, limit, shared.contiguous())
    totals = tuple(getattr(w, "main_grad", None) for w in masters)
    return _RoutedExperts.apply(hidden, weights, experts, *masters, shared, limit, totals)  # type: ignore[return-value]


class _RoutedExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weights: Tensor,
        experts: Tensor,
        w1: Tensor,
        w2: Tensor,
        w3: Tensor,
        shared: Tensor,
        limit: float,
        totals: tuple[Tensor | None, ...],
    ) -> Tensor:
        from consilience.model.kernels.triton_moe import combine, expand, swiglu_forward
        from consilience.model.kernels.triton_route import sort_pairs

        hidden, weights = hidden.contiguous(), weights.contiguous()
        order, inverse, ends = sort_pairs(experts.contiguous(), w1.shape[0])
        rows = expand(hidden, inverse)
        gate = named("expert_activations", forward_mm, rows, w1, ends)
        up = named("expert_activations", forward_mm, rows, w3, ends)
        del rows
        active = swiglu_forward(gate, up, limit, weights, order)
        down = forward_mm(active, w2, ends)
        ctx.save_for_backward(hidden, weights, w1, w2, w3, order, inverse, ends, gate, up)
        ctx.limit, ctx.totals = limit, totals
        return combine(down, inverse, base=shared.contiguous())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        from consilience.model.kernels.triton_moe import combine, expand, swiglu_backward

        hidden, weights, w1, w2, w3, order, inverse, ends, gate, up = ctx.saved_tensors
        needs_hidden, needs_weights, _, *needs_masters, needs_shared = ctx.needs_input_grad[:7]
        d_down = expand(grad.contiguous(), inverse)
        d_active = backward_mm(d_down, w2, ends)
        d_gate, d_up, active, d_weights = swiglu_backward(d_active, gate, up, ctx.limit, weights, order)
        del d_active
        d_w: list[Tensor | None] = [None, None, None]
        if needs_masters[1]:
            d_w[1] = weight_gradient(d_down, active, ends, w2, ctx.totals[1])  # type: ignore[arg-type]
        del d_down, active
        if needs_masters[0] or needs_masters[2]:
            rows = expand(hidden, inverse)
            for n, (d, w) in enumerate(((d_gate, w1), (None, None), (d_up, w3))):
                if d is not None and needs_masters[n]:
                    d_w[n] = weight_gradient(d, rows, ends, w, ctx.totals[n])  # type: ignore[arg-type]
            del rows
        d_hidden = None
        if needs_hidden:
            d_rows = backward_mm(d_gate, w1, ends)
            d_hidden = combine(d_rows, inverse, second=backward_mm(d_up, w3, ends))
        d_weights = d_weights if needs_weights else None
        return d_hidden, d_weights, None, *d_w, grad if needs_shared else None, None, None


def forward_mm(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """rows [N, in] sorted by expert, weight [E, out, in], ends [E] -> [N, out]."""
    return functional.grouped_mm(rows, weight.transpose(1, 2), offs=ends)


def backward_mm(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """rows [N, out], weight [E, out, in] -> [N, in]."""
    return functional.grouped_mm(rows, weight, offs=ends)


def weight_gradient(
    d_out: Tensor, rows: Tensor, ends: Tensor, weight: Tensor, total: Tensor | None
) -> Tensor | None:
    """Gradient of weight [E, out, in] from d_out [N, out], rows [N, in]; None where it went into `total`."""
    if total is None:
        return functional.grouped_mm(d_out.t(), rows, offs=ends).to(weight.dtype)
    from consilience.model.kernels.triton_moe import add_weight_gradient

    add_weight_gradient(d_out, rows, ends, total)
    return None


# ---- the shared expert --------------------------------------------------------------------------


def shared_expert(shared: Any, hidden: Tensor) -> Tensor:
    """What a `SharedExperts` gives, [R, D] -> [R, D] bf16, its SwiGLU in one pass each way."""
    weights = (shared.w1.weight, shared.w2.weight, shared.w3.weight)
    if shared.quantization.linears and fp8_linear.is_available(hidden, *weights):
        return fp8_expert.by_kernels(hidden, *weights, shared.limit)
    gate, up = named("expert_activations", project, hidden, shared.w1, shared.w3)
    return shared.w2(_SwiGLU.apply(gate, up, shared.limit))


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, limit: float) -> Tensor:
        from consilience.model.kernels.triton_moe import swiglu_forward

        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        ctx.limit = limit
        return swiglu_forward(gate, up, limit)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        from consilience.model.kernels.triton_moe import swiglu_backward

        gate, up = ctx.saved_tensors
        d_gate, d_up, _, _ = swiglu_backward(grad.contiguous(), gate, up, ctx.limit)
        return d_gate, d_up, None
