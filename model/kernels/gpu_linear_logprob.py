"""`linear_logprob` on a GPU: products by cuBLAS, one pass over each row of logits by `triton_logprob_rows`.

Forward keeps u = p − 1[v = y] of as many tokens as `keep_bytes` allows, in the type of the operands (where
p_y is near 1, u_y keeps its digits); later tokens are projected again in backward, one pass over their rows.
With upstream gradients a (of logprob), b (of entropy) and temperature τ

    ∂/∂z_v = (−a u_v − b p_v (log p_v + entropy)) / τ

so without b the kept u goes into the products as it is: dH = −a/τ · (u W), dW = −uᵀ (a/τ · h).

Shapes: n tokens, c of a chunk, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from consilience.model.kernels.head_products import (
    add_head_gradient_,
    filled,
    hidden_gradient,
    padded_rows,
    project,
)


class Plan(NamedTuple):
    """chunk_tokens, temperature, keep_bytes (0: no gradient is wanted or nothing may be kept), head_grad."""

    chunk_tokens: int
    temperature: float
    keep_bytes: int
    head_grad: Tensor | None


def run(hidden: Tensor, head: Tensor, target_ids: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """(logprob [n], entropy [n]) fp32 of hidden [n, D], head [V, D], target_ids [n]."""
    return _LinearLogprob.apply(hidden, head, target_ids, plan)  # pyright: ignore[reportReturnType]


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, target_ids: Tensor, plan: Plan
    ) -> tuple[Tensor, Tensor]:
        from consilience.model.kernels import triton_logprob_rows as rows

        ctx.set_materialize_grads(False)
        n, V = hidden.shape[0], head.shape[0]
        operand = torch.promote_types(hidden.dtype, head.dtype)
        W = head.to(operand)
        height = padded_rows(n, plan.chunk_tokens)
        logits = hidden.new_empty(height, V, dtype=torch.float32)
        num_kept = min(n, plan.keep_bytes // (V * operand.itemsize))
        num_kept = n if num_kept == n else num_kept // max(height, 1) * height
        # The last chunk is filled up with rows of zeros, and so is its share of what is kept.
        kept = hidden.new_empty(-(-num_kept // max(height, 1)) * height, V, dtype=operand)
        statistics = hidden.new_empty(n, rows.NUM_STATISTICS, dtype=torch.float32)
        for start, size in _chunks(n, height):
            part = slice(start, start + size)
            project(filled(hidden[part].to(operand), height), W, logits)
            target = filled(target_ids[part], height)
            u = kept[start : start + height] if start < num_kept else None
            statistics[part] = rows.row_pass(logits, target, plan.temperature, u)[:size]
        logprob, entropy = rows.summary(statistics)
        ctx.save_for_backward(hidden, head, target_ids, statistics, kept)
        ctx.plan, ctx.num_kept = plan, num_kept
        return logprob, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, Tensor | None, None, None]:
        from consilience.model.kernels import triton_logprob_rows as rows

        hidden, head, target_ids, statistics, kept = ctx.saved_tensors
        plan: Plan = ctx.plan
        n, V = hidden.shape[0], head.shape[0]
        operand = torch.promote_types(hidden.dtype, head.dtype)
        W = head.to(operand)
        height = padded_rows(n, plan.chunk_tokens)
        dH = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        dW = plan.head_grad
        if dW is None and ctx.needs_input_grad[1]:
            dW = torch.zeros_like(head, dtype=torch.float32)
        a, b = grads
        a = statistics.new_zeros(n) if a is None else a.float()
        buffers: list[Tensor] = []
        for start, size in _chunks(n, height):
            part = slice(start, start + size)
            h = filled(hidden[part].to(operand), height)
            target, here = filled(target_ids[part], height), filled(statistics[part], height, 1.0)
            a_c = filled(a[part], height) / plan.temperature
            b_c = None if b is None else filled(b[part].float(), height) / plan.temperature
            scale: Tensor | None = None
            if start < ctx.num_kept:
                g = kept[start : start + height]
                if b_c is None:
                    scale = -a_c[:, None]
                else:
                    # Into a buffer: what is kept must serve a second backward too.
                    g = rows.gradient_of_kept(g, target, here, a_c, b_c)
            else:
                buffers = buffers or [
                    hidden.new_empty(height, V, dtype=torch.float32),
                    hidden.new_empty(height, V, dtype=operand),
                ]
                logits, g = buffers
                project(h, W, logits)
                rows.gradient(logits, target, here, plan.temperature, a_c, b_c, g)
            if dH is not None:
                product = hidden_gradient(g, W, torch.float32 if scale is not None else operand)
                dH[part] = (product if scale is None else product * scale)[:size].to(dH.dtype)
            if dW is not None:
                add_head_gradient_(dW, g, h if scale is None else (h * scale).to(operand))
        grad_head = None if dW is None or plan.head_grad is not None else dW.to(head.dtype)
        return dH, grad_head, None, None


def _chunks(n: int, height: int) -> list[tuple[int, int]]:
    """(first row, rows) of each chunk."""
    return [(start, min(height, n - start)) for start in range(0, n, max(height, 1))]
