"""Each group of heads through its own matrix, for a GPU: products read and write rows where they lie.

Composed, the result of `bmm` lies group by group and is copied into rows, forward and backward: at Flash's
widths that is 0.27 ms a layer of 4,096 tokens.

R tokens, G groups.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from consilience.model.recompute import named


def grouped_projection(x: Tensor, weight: Tensor) -> Tensor:
    """x [R, G, in] contiguous, weight [G, out, in] -> [R, G, out] contiguous, in their type."""
    return _GroupedProjection.apply(x, weight)  # type: ignore[return-value]


class _GroupedProjection(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return named("attention_inner", _rows_times, x, weight.transpose(1, 2))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        d_x = _rows_times(grad, weight) if ctx.needs_input_grad[0] else None
        d_weight = torch.bmm(grad.permute(1, 2, 0), x.transpose(0, 1)) if ctx.needs_input_grad[1] else None
        return d_x, d_weight


def _rows_times(rows: Tensor, matrices: Tensor) -> Tensor:
    """rows [R, G, in], matrices [G, in, out] -> [R, G, out]."""
    made = rows.new_empty(*rows.shape[:2], matrices.shape[2])
    torch.bmm(rows.transpose(0, 1), matrices, out=made.transpose(0, 1))
    return made
