"""`linear_logprob` on a GPU: products by cuBLAS, one pass over each row of logits by `triton_logprob_rows`.

In exact mode the logits are those of `exact.logits`, divided by the temperature as the sampler divides them.

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

from consilience.model import exact
from consilience.model.kernels.head_products import (
    GRADIENT_TOKENS,
    HeadGradient,
    filled,
    hidden_gradient,
    padded_rows,
    project,
)


class Plan(NamedTuple):
    """chunk_tokens, temperature, keep_bytes (0: no gradient is wanted or nothing may be kept), head_grad;
    is_exact: forward computes in exact mode."""

    chunk_tokens: int
    temperature: float
    keep_bytes: int
    head_grad: Tensor | None
    is_exact: bool = False


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
            temperature = _project(filled(hidden[part].to(operand), height), W, logits, plan)
            target = filled(target_ids[part], height)
            u = kept[start : start + height] if start < num_kept else None
            statistics[part] = rows.row_pass(logits, target, temperature, u)[:size]
        logprob, entropy = rows.summary(statistics)
        ctx.save_for_backward(hidden, head, target_ids, statistics, kept)
        ctx.plan, ctx.num_kept = plan, num_kept
        return logprob, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden, head, target_ids, statistics, kept = ctx.saved_tensors
        plan: Plan = ctx.plan
        n = hidden.shape[0]
        operand = torch.promote_types(hidden.dtype, head.dtype)
        height = padded_rows(n, plan.chunk_tokens)
        dH = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        wants_head = ctx.needs_input_grad[1] or plan.head_grad is not None
        dW = HeadGradient(head, plan.head_grad) if wants_head else None
        work = _Backward(head.to(operand), plan, statistics, dH, dW, hidden, target_ids)
        # What is kept needs no logits, so more of it goes into a product.
        wide = height * max(1, GRADIENT_TOKENS // max(height, 1))
        for start, size in _chunks(ctx.num_kept, wide):
            work.kept(start, size, kept[start : start + -(-size // height) * height], grads)
        for start, size in _chunks(n - ctx.num_kept, height):
            work.projected(ctx.num_kept + start, size, height, grads)
        grad_head = None if dW is None or plan.head_grad is not None else dW.result().to(head.dtype)
        return dH, grad_head, None, None


class _Backward:
    """Fills dH [n, D] and dW [V, D] from upstream gradients (of logprob, of entropy), each [n] or None."""

    def __init__(
        self,
        W: Tensor,
        plan: Plan,
        statistics: Tensor,
        dH: Tensor | None,
        dW: HeadGradient | None,
        hidden: Tensor,
        target_ids: Tensor,
    ):
        self.W, self.plan, self.statistics = W, plan, statistics
        self.dH, self.dW, self.hidden, self.target_ids = dH, dW, hidden, target_ids
        self.buffers: list[Tensor] = []

    def kept(self, start: int, size: int, u: Tensor, grads: tuple[Tensor | None, ...]) -> None:
        """Rows [start, start + size), whose u [height, V] was kept in forward."""
        from consilience.model.kernels import triton_logprob_rows as rows

        h, target, statistics, a, b = self._rows(start, size, len(u), grads)
        if b is None:
            self._products(start, size, u, h, -a[:, None])
        else:
            # Not in place: what is kept must serve a second backward too.
            self._products(start, size, rows.gradient_of_kept(u, target, statistics, a, b), h, None)

    def projected(self, start: int, size: int, height: int, grads: tuple[Tensor | None, ...]) -> None:
        """Rows [start, start + size), whose logits are made again."""
        from consilience.model.kernels import triton_logprob_rows as rows

        h, target, statistics, a, b = self._rows(start, size, height, grads)
        if not self.buffers:
            empty = lambda dtype: h.new_empty(height, self.W.shape[0], dtype=dtype)
            self.buffers = [empty(torch.float32), empty(self.W.dtype)]
        logits, g = self.buffers
        project(h, self.W, logits)
        rows.gradient(logits, target, statistics, self.plan.temperature, a, b, g)
        self._products(start, size, g, h, None)

    def _rows(
        self, start: int, size: int, height: int, grads: tuple[Tensor | None, ...]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        part = slice(start, start + size)
        upstream = [None if g is None else filled(g[part].float(), height) for g in grads]
        a, b = (None if g is None else g / self.plan.temperature for g in upstream)
        a = self.statistics.new_zeros(height) if a is None else a
        h = filled(self.hidden[part].to(self.W.dtype), height)
        return h, filled(self.target_ids[part], height), filled(self.statistics[part], height, 1.0), a, b

    def _products(self, start: int, size: int, g: Tensor, h: Tensor, scale: Tensor | None) -> None:
        """The two products with ∂/∂z = scale · g."""
        if self.dH is not None:
            product = hidden_gradient(g, self.W, self.W.dtype if scale is None else torch.float32)
            product = product if scale is None else product.mul_(scale)
            self.dH[start : start + size] = product[:size].to(self.dH.dtype)
        if self.dW is not None:
            h = h if scale is None else (h * scale).to(h.dtype)
            self.dW.add(g, h, is_only=size == len(self.hidden))


def _project(h: Tensor, W: Tensor, logits: Tensor, plan: Plan) -> float:
    """Fill logits [c, V] from h [c, D] and the head; returns the temperature that they are still to be
    divided by."""
    if not plan.is_exact:
        project(h, W, logits)
        return plan.temperature
    exact.logits(h, W, out=logits)
    if plan.temperature != 1.0:
        # By a tensor: by a number PyTorch multiplies with its inverse on a GPU, and the sampler divides.
        logits.div_(logits.new_full((), plan.temperature))
    return 1.0


def _chunks(n: int, height: int) -> list[tuple[int, int]]:
    """(first row, rows) of each chunk."""
    return [(start, min(height, n - start)) for start in range(0, n, max(height, 1))]
