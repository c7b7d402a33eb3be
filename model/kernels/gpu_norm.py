"""RMS norm and rotation on a GPU behind autograd (triton_norm.py); `norm_rotate.py` chooses it.

Exact mode runs it too: a program's tile and the order of a row's sum depend on the width alone, never on how
many rows there are or where among them a row lies.
"""

from __future__ import annotations

import torch
from torch import Tensor

from consilience.model.kernels.choice import can_use_triton


def is_available(x: Tensor, rotation: Tensor | None) -> bool:
    """Whether the kernels take these: on a GPU, channels in whole pairs, a row within a program's reach."""
    if not can_use_triton(x, rotation) or not x.is_floating_point():
        return False
    width = x.shape[-1]
    return 0 < width <= 16384 and (rotation is None or width % 2 == 0)


class _GpuNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, turn, eps, sign):  # type: ignore[override]
        from consilience.model.kernels import triton_norm

        ctx.save_for_backward(None if eps is None else x, weight, turn)
        ctx.eps, ctx.sign = eps, sign
        return triton_norm.forward(x, weight, turn, eps, sign)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        from consilience.model.kernels import triton_norm

        x, weight, turn = ctx.saved_tensors
        grad = grad.contiguous()
        if ctx.eps is None:
            return triton_norm.forward(grad, None, turn, None, -ctx.sign), None, None, None, None
        d_x, d_weight = triton_norm.backward(x, weight, turn, ctx.eps, ctx.sign, grad)
        return d_x, None if d_weight is None else d_weight.to(weight.dtype), None, None, None


def norm_rotate(
    x: Tensor, weight: Tensor | None, rotation: Tensor | None, eps: float | None, sign: float
) -> Tensor:
    """As `norm_rotate.norm_rotate`, of any float type but fp64; fp32 inside, one rounding at the end.

    A weight without a norm has no use here and no gradient.
    """
    turn = None if rotation is None else torch.view_as_real(rotation.resolve_conj()).contiguous()
    x, weight = _aligned(x), None if weight is None else _aligned(weight)
    return _GpuNorm.apply(x, weight, turn, eps, sign)  # type: ignore[return-value]


def _aligned(x: Tensor) -> Tensor:
    """x contiguous, from an address that Triton reads in full vectors: others get other code, other sums."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x
