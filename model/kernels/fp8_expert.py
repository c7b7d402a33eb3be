"""A shared expert in FP8 on a GPU: its SwiGLU reads and writes beside the products of `fp8_linear.py` once.

The twin is `SharedExperts` in model/moe.py, whose projections are those of `fp8_linear.py`; the numbers are
the same to the bit but for the sum of two gradients of x. Kept for the backward: codes of x and of the
SwiGLU's output, gate and up in x's type.

R rows, D model width, I expert width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from consilience.model.kernels.fp8_linear import product, weight_codes
from consilience.model.recompute import named


def by_kernels(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, limit: float) -> Tensor:
    """w2 · (silu(min(w1 x, limit)) · clamp(w3 x, ±limit)): x [R, D] -> [R, D].

    For what `fp8_linear.is_available` takes: w1, w3 [I, D], w2 [D, I].
    """
    if not torch.is_grad_enabled():
        return _forward(x, (w1, w2, w3), limit, False, False)[0]
    return _Expert.apply(x, w1, w2, w3, limit)  # type: ignore[return-value]


def _forward(
    x: Tensor, weights: tuple[Tensor, Tensor, Tensor], limit: float, needs_x: bool, needs_weights: bool
) -> tuple[Tensor, list[Tensor | None]]:
    """The output, and what the backward reads: turned codes of x, SwiGLU, w1, w2, w3; gate, up."""
    from consilience.model.kernels import triton_swiglu_codes
    from consilience.model.kernels.triton_quantize import encode_rows

    keeps = not (needs_x or needs_weights)
    codes = encode_rows(x, has_turned=needs_weights)
    encoded = [weight_codes(w, keeps=keeps, has_turned=not keeps) for w in weights]
    gate, up = named("expert_activations", _gate_and_up, codes[:2], encoded[0][:2], encoded[2][:2], x)
    active = triton_swiglu_codes.forward(gate, up, limit, has_turned=needs_weights)
    out = product(active[:2], encoded[1][:2], x.dtype, is_tiled=True)[: x.shape[0]]
    turned = [half for each in (codes, active, *encoded) for half in each[2:]]
    return out, [*turned, gate, up]


def _gate_and_up(codes: Any, w1: Any, w3: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = (product(codes, w, x.dtype, is_tiled=True)[: x.shape[0]] for w in (w1, w3))
    return gate, up


class _Expert(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, limit: float) -> Tensor:
        needs_x, *needs_weights = ctx.needs_input_grad[:4]
        out, kept = _forward(x, (w1, w2, w3), limit, needs_x, any(needs_weights))
        ctx.save_for_backward(*kept)
        ctx.limit, ctx.dtypes = limit, (w1.dtype, w2.dtype, w3.dtype)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        from consilience.model.kernels import triton_swiglu_codes
        from consilience.model.kernels.triton_quantize import encode_rows

        *turned, gate, up = ctx.saved_tensors
        rows, active, w1, w2, w3 = zip(turned[::2], turned[1::2])
        needs_x, needs_w1, needs_w2, needs_w3 = ctx.needs_input_grad[:4]
        dtypes, num_rows = ctx.dtypes, grad.shape[0]
        d_out = encode_rows(grad, has_turned=needs_w2)
        d_w2 = product(d_out[2:], active, dtypes[1]) if needs_w2 else None
        if not (needs_x or needs_w1 or needs_w3):
            return None, None, d_w2, None, None
        d_active = product(d_out[:2], w2, grad.dtype, is_tiled=True)[:num_rows]
        flags = {"has_codes": needs_x, "has_turned": needs_w1 or needs_w3}
        d_gate, d_up = triton_swiglu_codes.backward(d_active, gate, up, ctx.limit, **flags)
        d_x = None
        if needs_x:
            d_x = product(d_gate[:2], w1, grad.dtype, is_tiled=True)[:num_rows]
            d_x += product(d_up[:2], w3, grad.dtype, is_tiled=True)[:num_rows]
        d_w1 = product(d_gate[2:], rows, dtypes[0]) if needs_w1 else None
        d_w3 = product(d_up[2:], rows, dtypes[2]) if needs_w3 else None
        return d_x, d_w1, d_w2, d_w3, None
